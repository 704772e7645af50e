"""The run.yaml and the command that are kept beside a checkpoint, and what changed since the last.

``run.yaml`` is complete: interpolations and overrides are in it, so the run can be started from it
alone; variables of the environment and secrets are in it by name. A start that changes nothing
writes nothing. The file of an earlier start stays as ``run.1.yaml``, ``run.2.yaml`` and on, when it
differs.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from megasft.files import require_no_writer, write_whole
from megasft.launch import written
from megasft.launch.command import as_comment, resolved_yaml, shell, started

if TYPE_CHECKING:
    from megasft.launch.run import Run

logger = logging.getLogger(__name__)

CONFIG: Final = "run.yaml"
COMMAND: Final = "run.sh"
PACKAGES: Final = ("megasft", "megatron-core", "torch")
_ABSENT: Final = "(none)"


def require_free(run: Run) -> None:
    """Check, before anything is written, that no other run saves where this one will.

    Raises:
        FlagError: One does; its host and process are named.
    """
    if run.save is not None:
        require_no_writer(run.save)


def save(run: Run) -> None:
    """Write both files into ``checkpoint.save``; tell what differs from the last start there."""
    if run.save is None:
        return
    run.save.mkdir(parents=True, exist_ok=True)
    path = run.save / CONFIG
    text = resolved_yaml(run.settings)
    if path.is_file():
        changes = differences(path.read_text(), text)
        if changes:
            path.rename(_free_name(run.save))
            logger.warning("%s: changed since the last start there: %s", path, "; ".join(changes))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    header = as_comment("\n".join([*started(run), f"in {Path.cwd()}, with {versions}"]))
    _write_changed(path, header + text)
    _write_changed(run.save / COMMAND, f"#!/usr/bin/env bash\n{header}{shell(run)}")


def _write_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        write_whole(path, text.encode())


def differences(before: str, after: str) -> list[str]:
    """Return the keys whose values differ between two run.yaml, with both values.

    Example:
        >>> differences("optim: {lr: 1}", "optim: {lr: 2}")
        ['optim.lr 1 -> 2']
    """
    old, new = (_flat(yaml.safe_load(text) or {}) for text in (before, after))
    return [
        f"{name} {old.get(name, _ABSENT)} -> {new.get(name, _ABSENT)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _flat(tree: dict[str, Any]) -> dict[str, str]:
    flat = {(s, k): v for s, keys in tree.items() for k, v in (keys or {}).items()}
    if isinstance(env := flat.get(written.ENV), dict):
        flat[written.ENV] = written.environment(env)
    return {f"{s}.{k}": str(v) for (s, k), v in flat.items()}


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"run.{number}.yaml").exists():
        number += 1
    return path
