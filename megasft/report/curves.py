"""A run's ``steps.jsonl`` as curves: a value for each step it was reported of.

A run that was stopped and resumed has one file; where it holds a step twice, the later line counts,
because it is the run that went on. Lines that were cut off in writing are passed over.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.errors import DataError

FILE: Final = "steps.jsonl"
_PLACES: Final = (".", "log")
"""Where a run's folder may have the file: the log folder itself, or ``--save``."""

Curve = dict[int, float]
"""Value at each step, ascending by step."""


@dataclass(slots=True)
class RunCurves:
    """What a run reported.

    Attributes:
        name: What a legend calls it.
        train: Curves by the keys of a line: ``loss``, ``grad_norm``, ...
        categories: Loss per token of each category, that with the most labels first.
        valid: ``loss`` of each validation set.
    """

    name: str
    train: dict[str, Curve] = field(default_factory=dict)
    categories: dict[str, Curve] = field(default_factory=dict)
    valid: dict[str, Curve] = field(default_factory=dict)


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """Read several runs, and name each by what tells it from the others.

    Raises:
        DataError: A path holds no ``steps.jsonl``, or one without a step.
    """
    return [read_run(path, name=name) for path, name in zip(paths, names_of(paths), strict=True)]


def read_run(path: Path, *, name: str) -> RunCurves:
    """Read a run.

    Args:
        path: The file, its folder, or the run's ``--save``.
        name: What to call it.

    Raises:
        DataError: There is no such file, or no step in it.
    """
    run, labels = RunCurves(name), dict[str, int]()
    by_step: dict[int, dict[str, Any]] = {}
    for line in _lines(file_of(path)):
        if "validation" in line:
            for set_name, losses in line["validation"].items():
                if losses is not None:
                    run.valid.setdefault(set_name, {})[line["steps"]] = losses["loss"]
        else:
            by_step[line["steps"]] = line
    if not by_step:
        raise DataError(f"{file_of(path)} holds no step yet")
    for step, line in sorted(by_step.items()):
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                run.train.setdefault(key, {})[step] = float(value)
        for category, means in line["categories"].items():
            run.categories.setdefault(category, {})[step] = means["loss"]
            labels[category] = labels.get(category, 0) + means["labels"]
    largest_first = sorted(run.categories, key=lambda category: -labels[category])
    run.categories = {category: run.categories[category] for category in largest_first}
    return run


def file_of(path: Path) -> Path:
    """Return the file of a run.

    Raises:
        DataError: There is none.
    """
    if path.is_file():
        return path
    for place in _PLACES:
        if (path / place / FILE).is_file():
            return path / place / FILE
    raise DataError(
        f"{path} has no {FILE}; give a run's --megasft-log-dir or --save, or the file itself"
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the parts of paths that differ, as names.

    Example:
        >>> names_of([Path("runs/turn/log"), Path("runs/token/log")])
        ['turn', 'token']
    """
    parts = [list(path.absolute().parts) for path in paths]
    if len({tuple(p) for p in parts}) < len(parts):
        raise DataError(f"a run is given twice: {', '.join(map(str, paths))}")
    if len(parts) == 1:
        return [parts[0][-1]]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                del p[end]
    return ["/".join(p) for p in parts]


def smooth(curve: Curve, *, window: int) -> Curve:
    """Return the mean over the ``window`` values around each step, fewer at both ends.

    Example:
        >>> smooth({1: 0.0, 2: 3.0, 3: 6.0}, window=3)
        {1: 1.5, 2: 3.0, 3: 4.5}
    """
    steps, values = list(curve), list(curve.values())
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, smoothed = window // 2, {}
    for n, step in enumerate(steps):
        start, stop = max(0, n - half), min(len(values), n + half + 1)
        smoothed[step] = (sums[stop] - sums[start]) / (stop - start)
    return smoothed


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            yield orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
