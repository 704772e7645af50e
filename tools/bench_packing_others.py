"""The packers ours are compared with: best fit sample by sample, first fit, and TRL's."""

from bisect import bisect_left, insort
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
_INSTALL_TRL = "trl is not installed here: make a second venv with `pip install trl` and megasft"


def best_fit_one_by_one(lengths: Lengths, row_tokens: int) -> Lengths:
    """Return the row of each sample by best fit decreasing, with a sorted list of rooms.

    The usual way without a histogram: O(log R) to find the fullest row, and a list to shift.
    """
    row_of = np.empty(len(lengths), np.int64)
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    num_rows = 0
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = row_tokens, num_rows
            num_rows += 1
        row_of[sample] = row
        if room > length:
            insort(rooms, (room - length, row))
    return row_of


def first_fit(lengths: Lengths, row_tokens: int) -> Lengths:
    """Return the row of each sample by first fit, as they come.

    A tree over rows holds the largest room below each node, so the first row with room is found
    without a look at all of them.
    """
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    largest = [row_tokens] * (2 * leaves)
    row_of = []
    for length in lengths.tolist():
        node = 1
        while node < leaves:
            node *= 2
            if largest[node] < length:
                node += 1
        row_of.append(node - leaves)
        largest[node] -= length
        while node > 1:
            node //= 2
            left, right = largest[2 * node], largest[2 * node + 1]
            largest[node] = left if left > right else right
    return np.array(row_of)


class TrlPacker:
    """``trl.data_utils.pack_dataset`` with strategy ``bfd``, by its own defaults.

    It packs token columns, not lengths: here one byte a token, so that the copies it makes are as
    cheap as they can be. The rows come back as ``seq_lengths``.
    """

    def __init__(self) -> None:
        try:
            import trl  # type: ignore[import-not-found]
            from trl.data_utils import pack_dataset  # type: ignore[import-not-found]
        except ImportError as error:
            raise ModuleNotFoundError(_INSTALL_TRL) from error
        self.name, self._pack = f"TRL {trl.__version__}", pack_dataset

    def dataset(self, lengths: Lengths) -> object:
        """Return samples of these lengths as TRL wants them; not timed."""
        import pyarrow as pa
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        values = pa.array(np.zeros(int(offsets[-1]), np.int8))
        tokens = pa.LargeListArray.from_arrays(pa.array(offsets), values)
        return Dataset(pa.table({"input_ids": tokens}))

    def pack(self, dataset: object, row_tokens: int) -> Any:
        """Return TRL's packed dataset."""
        return self._pack(dataset, row_tokens, strategy="bfd")

    def rows(self, packed: Any) -> list[list[int]]:
        """Return the lengths in each row; not timed."""
        rows: list[list[int]] = packed["seq_lengths"][:]
        return rows
