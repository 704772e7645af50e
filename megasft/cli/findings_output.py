"""What `lint`, `doctor` and `plan` print alike: colours of severities, width, and the JSON file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

STYLES: Final = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_WIDE: Final = 10_000
"""Columns where there is no terminal: a finding stays on its line, for grep."""


def as_json(content: Any, *, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return what a file of ``--json`` holds; see ``write_json``."""
    import orjson

    return orjson.dumps(content, option=orjson.OPT_INDENT_2, default=default) + b"\n"


def new_console() -> Console:
    """Return a console that cuts no line where nobody looks at a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def style_of_verdict(worst: str | None) -> str:
    """Return the style of a report whose worst finding has this severity; None for none."""
    return STYLES[worst] if worst in ("error", "warning") else "bold green"


def write_json(
    content: Any,
    path: Path,
    *,
    default: Callable[[Any], Any] | None = None,
    error_type: type[Exception] = typer.BadParameter,
) -> None:
    """Write the file of ``--json``.

    Args:
        content: What JSON can say.
        path: The file.
        default: Makes something of what JSON cannot say.
        error_type: What is raised when the file cannot be written.
    """
    try:
        path.write_bytes(as_json(content, default=default))
    except OSError as error:
        raise error_type(
            f"--json {path} cannot be written ({error.strerror}); name a file in an existing folder"
        ) from None
