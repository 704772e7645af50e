"""Sample lengths to rows, by best fit decreasing over a histogram of lengths.

Lengths are integers no longer than a row, so all samples of one length are one group, and so are
all rows with the same room left: a step places many samples at once, and the cost depends on the
number of distinct lengths, not of samples (1M samples into rows of 4,096: well under a second,
where a sample-by-sample best fit takes minutes). Rejected: first fit over shuffled samples (rows a
few per mille above the lower bound, and O(N x rows)); next fit (3 % padding). Best fit makes rows
of like-sized samples, so rows are shuffled before they are trained (``order.py``).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megasft.errors import PlanError


@dataclass(frozen=True, slots=True)
class Rows:
    """Which samples make which row.

    Attributes:
        samples: int64 [placed]. Sample indices, row after row.
        borders: int64 [R + 1]. Where each row starts in ``samples``.
    """

    samples: npt.NDArray[np.int64]
    borders: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        return self.samples[self.borders[row] : self.borders[row + 1]]


def best_fit(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int = 1, seed: int = 0
) -> Rows:
    """Pack samples into rows, longest first, each into the fullest row that still takes it.

    Args:
        lengths: int64 [S]. Tokens of each sample; all within ``[1, row_tokens]`` when aligned.
        row_tokens: Capacity of a row.
        align_tokens: Each sample takes a multiple of this many tokens.
        seed: Which of equally long samples goes where.

    Returns:
        Every sample exactly once; longer samples first within a row.

    Raises:
        PlanError: A sample, padded to the alignment, is longer than a row or empty.

    Example:
        >>> rows = best_fit(np.array([5, 3, 2]), row_tokens=8)
        >>> [rows[r].tolist() for r in range(len(rows))]
        [[0, 1], [2]]
    """
    padded = -(-lengths // align_tokens) * align_tokens
    if len(lengths) and (padded.max() > row_tokens or lengths.min() < 1):
        worst = int(np.argmax(padded)) if padded.max() > row_tokens else int(np.argmin(lengths))
        raise PlanError(
            f"sample {worst} has {int(lengths[worst])} tokens ({int(padded[worst])} when aligned "
            f"to {align_tokens}) and cannot be placed in a row of {row_tokens}"
        )
    row_of_slot = _row_of_each_slot(np.bincount(padded, minlength=row_tokens + 1), row_tokens)
    # Slots run from the longest length to the shortest; deal samples of one length at random.
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    by_length = shuffled[np.argsort(-padded[shuffled], kind="stable")]
    order = np.argsort(row_of_slot, kind="stable")
    counts = np.bincount(row_of_slot) if len(row_of_slot) else np.zeros(0, np.int64)
    return Rows(by_length[order], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))


def _row_of_each_slot(histogram: npt.NDArray[np.int64], row_tokens: int) -> npt.NDArray[np.int64]:
    """Return the row of each placed sample, longest samples first.

    ``open_rows[room]`` holds runs of rows with that much room left. Best fit puts sample after
    sample of one length into the same row until it is full, so a row with room ``r`` takes
    ``r // length`` of them at once, and so do all rows of its run.
    """
    open_rows: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(row_tokens + 1)]
    has_rows = np.zeros(row_tokens + 1, dtype=bool)
    placed: list[npt.NDArray[np.int64]] = []
    num_rows = 0

    def put_back(rows: npt.NDArray[np.int64], room: int) -> None:
        if room and len(rows):
            open_rows[room].append(rows)
            has_rows[room] = True

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = np.flatnonzero(has_rows[length:])
            room = length + int(fitting[0]) if len(fitting) else row_tokens
            per_row = room // length
            if len(fitting):
                rows = open_rows[room].pop()
                has_rows[room] = bool(open_rows[room])
            else:
                rows = np.arange(num_rows, num_rows + -(-left // per_row))
                num_rows += len(rows)
            # [a, b, c] with 2 samples each: a a b b c c; what is left over goes into one more row.
            full = min(len(rows), left // per_row)
            rest = left - full * per_row if full < len(rows) else 0
            placed += [np.repeat(rows[:full], per_row), np.repeat(rows[full : full + 1], rest)]
            put_back(rows[:full], room - per_row * length)
            if rest:
                put_back(rows[full : full + 1], room - rest * length)
            put_back(rows[full + bool(rest) :], room)
            left -= full * per_row + rest
    return np.concatenate(placed) if placed else np.zeros(0, np.int64)
