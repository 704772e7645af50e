"""The run.yaml and the command that are kept beside a checkpoint, and what changed since the last.

``run.yaml`` is complete: interpolations and overrides are in it, so the run can be started from it
alone. That of an earlier start stays as ``run.1.yaml``, ``run.2.yaml`` and on, when it differs.
"""

from __future__ import annotations

import logging
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from megasft.files import write_whole
from megasft.launch.command import as_comment, resolved_yaml, shell

if TYPE_CHECKING:
    from megasft.launch.run import Run

logger = logging.getLogger(__name__)

CONFIG: Final = "run.yaml"
COMMAND: Final = "run.sh"
PACKAGES: Final = ("megasft", "megatron-core", "torch")
_ABSENT: Final = "(none)"


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
    started = shlex.join(["megasft", "train", str(run.config), *run.overrides])
    header = as_comment(f"{started}\nin {Path.cwd()}, with {versions}")
    write_whole(path, (header + text).encode())
    write_whole(run.save / COMMAND, f"#!/usr/bin/env bash\n{header}{shell(run)}".encode())


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
    return {f"{s}.{k}": str(v) for s, keys in tree.items() for k, v in (keys or {}).items()}


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"run.{number}.yaml").exists():
        number += 1
    return path
