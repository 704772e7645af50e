"""A line of JSON per step and per evaluation, in one file that a resumed run goes on with.

A line is written with one call and no buffer, so a run that is killed leaves at most one line
without its end, which the next run cuts off. A run that resumes at step k removes the lines of
step k and later before it writes its first, because these steps are trained again; what was there
is kept as ``steps.jsonl.before``, so starting again in a folder by mistake loses nothing. A run
that only evaluates (``--skip-train``), maybe an older checkpoint, removes none.
"""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.errors import FlagError
from megasft.files import write_whole
from megasft.report.curves import FILE
from megasft.report.record import Record, StepRecord, as_json
from megasft.report.sink import Setup

_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Jsonl:
    """Appends to ``steps.jsonl`` in the log folder."""

    def __init__(self, setup: Setup) -> None:
        assert setup.folder is not None, "a run without a folder has no such sink"
        self.path = setup.folder / FILE
        self.file: int | None = None
        self.trains = setup.trains
        try:
            setup.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FlagError(f"--megasft-log-dir {setup.folder} cannot be made: {error}") from error

    def write(self, record: Record) -> None:
        """Append a step or an evaluation."""
        if self.file is None:
            # The evaluation of step k belongs to a run that goes on after step k.
            after = record.step + 1 if self.trains else math.inf
            first_step = record.step if isinstance(record, StepRecord) else after
            cut_back(self.path, first_step=first_step)
            self.file = os.open(self.path, _APPEND, 0o644)
        os.write(self.file, _bytes(as_json(record)))

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a file that is not kept open."""
    file = os.open(path, _APPEND, 0o644)
    try:
        os.write(file, _bytes(line))
    finally:
        os.close(file)


def has_evaluation(folder: Path, *, step: int, names: Collection[str]) -> bool:
    """Say whether the file of a log folder holds the evaluation of a step.

    Args:
        folder: Where the file is, if there is one.
        step: Steps trained before the evaluation.
        names: Of its validation stores.
    """
    path = folder / FILE
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        if b'"validation":' in line and _step(line) == step:
            return set(orjson.loads(line)["validation"]) == set(names)
    return False


def cut_back(path: Path, *, first_step: float) -> None:
    """Remove the lines of steps that will be trained again, and a line without its end.

    Args:
        path: The file, which need not exist.
        first_step: The first step that will be written; infinite when none will be.
    """
    if not path.is_file():
        return
    old = path.read_bytes()
    kept = b"".join(
        line
        for line in old.splitlines(keepends=True)
        if line.endswith(b"\n") and _step(line) < first_step
    )
    if kept == old:
        return
    path.with_name(f"{path.name}.before").write_bytes(old)
    write_whole(path, kept)


def _bytes(line: dict[str, Any]) -> bytes:
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _step(line: bytes) -> float:
    """Return the step of a line; one that cannot be read comes after all of them."""
    try:
        return int(orjson.loads(line)["steps"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")
