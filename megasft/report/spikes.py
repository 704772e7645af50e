"""Which steps are spikes, and the losses of their conversations, kept in ``spikes.jsonl``.

A step is a spike when its loss is above a multiple of the median of the steps before it, or is no
number. The median was chosen over the mean because one spike must not hide the next. Losses per
conversation are summed in every step (in the all-reduce of the other sums) and written for spikes
alone: those of every step would be most of a log.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from megasft.errors import DataError
from megasft.report.jsonl import append_line, cut_back

FILE: Final = "spikes.jsonl"

WINDOW: Final = 50
"""Steps the median is taken over."""
FEWEST: Final = 3
"""Steps that must have been seen before one can be a spike."""


class SampleLoss(NamedTuple):
    """A conversation of a step.

    Attributes:
        sample: Index in the stores of the run, read as one.
        loss: Cross entropy per label token.
        labels: Label tokens.
    """

    sample: int
    loss: float
    labels: int


@dataclass(frozen=True, slots=True)
class Spike:
    """A step whose loss rose.

    Attributes:
        step: From 1.
        loss: What is optimised.
        median: Of the steps before it.
        stores: Folders of the run's stores.
        samples: Conversations that have labels, the one with the highest loss first.
    """

    step: int
    loss: float
    median: float
    stores: tuple[str, ...]
    samples: tuple[SampleLoss, ...]


class SpikeFile:
    """Decides which steps are spikes, and appends them to the file.

    Args:
        folder: Log folder.
        stores: Folders of the run's stores.
        factor: A spike's loss is above so many times the median.
    """

    def __init__(self, folder: Path, *, stores: Sequence[str], factor: float) -> None:
        self.path, self.stores, self.factor = folder / FILE, tuple(stores), factor
        self.before: deque[float] = deque(maxlen=WINDOW)
        self.is_cut_back = False

    def median_if_spike(self, loss: float) -> float | None:
        """Count a step; return the median before it when it is a spike."""
        median = statistics.median(self.before) if len(self.before) >= FEWEST else None
        if not math.isfinite(loss):
            return median
        self.before.append(loss)
        return median if median is not None and loss > self.factor * median else None

    def begin(self, step: int) -> None:
        """Remove spikes of steps that a resumed run trains again; called at the first step."""
        if not self.is_cut_back:
            cut_back(self.path, first_step=step)
            self.is_cut_back = True

    def write(self, spike: Spike) -> None:
        """Append a spike."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            name: [sample[n] for sample in spike.samples]
            for n, name in enumerate(SampleLoss._fields)
        }
        line = {"steps": spike.step, "loss": spike.loss, "median": spike.median}
        append_line(self.path, line | {"stores": spike.stores, "samples": columns})


def highest_first(
    samples: Sequence[int], sums: Sequence[Sequence[float]]
) -> tuple[SampleLoss, ...]:
    """Return the conversations that have labels, the one with the highest loss first.

    Losses that are not a number come before all others.

    Args:
        samples: Index of each.
        sums: Cross entropy and labels of each.
    """
    found = [
        SampleLoss(sample, ce / labels, round(labels))
        for sample, (ce, labels) in zip(samples, sums, strict=True)
        if labels
    ]
    return tuple(sorted(found, key=lambda one: (math.isfinite(one.loss), -one.loss)))


def read_spikes(folder: Path) -> list[Spike]:
    """Return the spikes of a run, in the order of steps.

    Args:
        folder: The run's log folder, or its ``--save``.

    Raises:
        DataError: There is no such file.
    """
    for place in (folder / FILE, folder / "log" / FILE):
        if place.is_file():
            return sorted(_spikes(place), key=lambda spike: spike.step)
    raise DataError(
        f"{folder} has no {FILE}: no step of the run was a spike, or it ran with "
        "--megasft-spikes 0, or this is not its --megasft-log-dir or --save"
    )


def _spikes(path: Path) -> Iterator[Spike]:
    for text in path.read_bytes().splitlines():
        try:
            line: dict[str, Any] = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue  # a run was killed while it wrote this
        columns = [line["samples"][name] for name in SampleLoss._fields]
        # JSON has no nan: it is written as null.
        samples = tuple(
            SampleLoss(sample, math.nan if loss is None else loss, labels)
            for sample, loss, labels in zip(*columns, strict=True)
        )
        stores = tuple(line["stores"])
        loss = math.nan if line["loss"] is None else line["loss"]
        yield Spike(line["steps"], loss, line["median"], stores, samples)
