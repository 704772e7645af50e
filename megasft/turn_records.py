"""Turn records as a store has them, read with weights of 1, and what can be said of their weights.

A store of format version 1 has no column of weights; a run that ignores weights must not see it.
Both read the records through ``UnitWeights``, so that every reader has records of one width. It
copies the records that are asked for, and keeps nothing but their lengths, once these are asked for
(4 bytes a sample). Rejected: to rewrite old stores, which may be read-only, and whose fingerprint
is that of the plans and checkpoints made with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.schema import TURN_FIELDS, UNIT_WEIGHT, turn_weights_of
from megasft.sequence_file import FlatSequences, Integers, Numbers, cut, offsets_of

WIDTHS: Final = {1: 4, 2: len(TURN_FIELDS)}
"""Columns of a turn record in each format version; the weight is the last one."""


class WeightRange(NamedTuple):
    """The turns of a store whose weight is not 1.

    Attributes:
        turns: How many there are.
        least: Smallest weight of all turns of the store.
        most: Largest.
    """

    turns: int
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.turns:,} turns have a weight other than 1; weights go from {self.least:.6g} "
            f"to {self.most:.6g}"
        )

    def joined(self, other: WeightRange) -> WeightRange:
        """Return that of two stores together."""
        least, most = min(self.least, other.least), max(self.most, other.most)
        return WeightRange(self.turns + other.turns, least, most)


def range_of(records: Integers) -> WeightRange | None:
    """Return the range of the weights; None where every turn weighs 1.

    Args:
        records: int32 [N, 5]. Turn records of a whole store.
    """
    weights = turn_weights_of(records)
    num_others = int((weights != 1).sum())
    if not num_others:
        return None
    return WeightRange(num_others, float(weights.min()), float(weights.max()))


def range_in(meta: Mapping[str, Any]) -> WeightRange | None:
    """Return the range that store.json holds; None where every turn weighs 1."""
    found = meta.get("turn_weights")
    return None if found is None else WeightRange(**found)


@dataclass(frozen=True)
class UnitWeights:
    """Turn records that are read as if every turn weighed 1.

    Attributes:
        file: The records.
        width: Columns they have there.
    """

    file: FlatSequences
    width: int = len(TURN_FIELDS)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 [S]. Elements of each sequence, as they are read."""
        return self.file.lengths // np.int32(self.width) * np.int32(len(TURN_FIELDS))

    @cached_property
    def offsets(self) -> Numbers:
        """int64 [S + 1]. Element at which each sequence starts in ``values``."""
        return offsets_of(self.lengths)

    @property
    def values(self) -> Integers:
        """int32 [total]. All records end to end, made whenever they are asked for."""
        return self._read(self.file.values)

    def __getitem__(self, index: int) -> Integers:
        return self._read(self.file[index])

    def views(self, numbers: Numbers) -> list[Integers]:
        """Return the records of several samples, in the order asked for."""
        records = self.file.views(numbers)
        if not records:
            return []
        read = self._read(np.concatenate(records))
        return cut(read, [len(own) // self.width * len(TURN_FIELDS) for own in records])

    def _read(self, flat: Integers) -> Integers:
        records = np.full((len(flat) // self.width, len(TURN_FIELDS)), UNIT_WEIGHT, np.int32)
        records[:, :-1] = flat.reshape(-1, self.width)[:, : len(TURN_FIELDS) - 1]
        return records.reshape(-1)
