"""What `lint`, `doctor` and `plan` print alike: lists of rules, paragraphs, verdicts, JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from megasft.checks.engine import Report, Rule

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


def print_rules(console: Console, rules: Iterable[Rule[..., Any]]) -> None:
    """Print what ``--list`` shows: each rule on a line, with what it finds."""
    from rich.text import Text

    for rule in rules:
        line = Text.assemble(
            (f"{rule.severity:<9}", STYLES[rule.severity]), (f"{rule.name:<25}", "bold")
        )
        line.append(f"{rule.theme}: {rule.meaning}" if rule.theme else rule.meaning)
        console.print(line, soft_wrap=True)


def print_hanging(console: Console, head: Text, text: str, *, indent: int) -> None:
    """Print a paragraph, the lines after the first indented; long words are left whole."""
    lines = textwrap.wrap(
        head.plain + text,
        console.width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    first = head.copy()
    first.append(lines[0][len(head.plain) :] if len(lines[0]) > len(head.plain) else "")
    console.print(first, soft_wrap=True)
    for line in lines[1:]:
        console.print(line, style=head.style, soft_wrap=True, markup=False)


def print_verdict(console: Console, report: Report, *, head: str = "") -> None:
    """Print the last line of a report, in the style of its worst finding."""
    worst = report.findings[0].severity if report.findings else "note"
    style = "bold green" if worst == "note" else STYLES[worst]
    console.print(head + report.verdict(), style=style, markup=False, soft_wrap=True)


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
