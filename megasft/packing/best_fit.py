"""Sample lengths to rows, by best fit decreasing over a histogram of lengths.

Lengths are integers no longer than a row, so all samples of one length are one group, and so are
all rows with the same room left: a step places many samples at once, and the cost depends on the
number of distinct lengths, not of samples (1M samples into rows of 4,096: well under a second,
where a sample-by-sample best fit takes minutes). Rejected: first fit over shuffled samples (rows a
few per mille above the lower bound, and O(N x rows)). Best fit makes rows of like-sized samples,
long ones here and crumbs there; ``balanced.py`` does not, and ends with best fit.
"""

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from megasft.packing.rows import Rows, Seed, aligned, gather, longest_first

_NO_ROWS = np.zeros(0, np.int64)


def best_fit(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int = 1, seed: Seed = 0
) -> Rows:
    """Pack samples into rows, longest first, each into the fullest row that still takes it.

    A ``Packer``; the seed decides which of equally long samples goes where. Longer samples are
    first within a row.

    Example:
        >>> rows = best_fit(np.array([5, 3, 2]), row_tokens=8)
        >>> [rows[r].tolist() for r in range(len(rows))]
        [[0, 1], [2]]
    """
    padded = aligned(lengths, row_tokens=row_tokens, align_tokens=align_tokens)
    histogram = np.bincount(padded, minlength=row_tokens + 1)
    return gather(longest_first(padded, seed=seed), fill(histogram, row_tokens=row_tokens))


def fill(
    histogram: npt.NDArray[np.int64],
    *,
    row_tokens: int,
    rooms: npt.NDArray[np.int64] = _NO_ROWS,
) -> npt.NDArray[np.int64]:
    """Place samples into rows that are there already, and open new ones for what fits none.

    ``open_rows[room]`` holds runs of rows with that much room left. Best fit puts sample after
    sample of one length into the same row until it is full, so a row with room ``r`` takes
    ``r // length`` of them at once, and so do all rows of its run.

    Args:
        histogram: int64 [row_tokens + 1]. Number of samples of each length.
        row_tokens: Capacity of a new row.
        rooms: int64 [R]. Room left in each row that is there; new ones are numbered from R on.

    Returns:
        int64 [S]. Row of each sample, longest samples first.
    """
    open_rows: defaultdict[int, list[npt.NDArray[np.int64]]] = defaultdict(list)
    has_rows = np.zeros(row_tokens + 1, dtype=bool)
    placed: list[npt.NDArray[np.int64]] = [_NO_ROWS]
    num_rows = len(rooms)

    def put_back(rows: npt.NDArray[np.int64], room: int) -> None:
        if room and len(rows):
            open_rows[room].append(rows)
            has_rows[room] = True

    for rows in _runs(rooms):
        put_back(rows, int(rooms[rows[0]]))
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            room = length + int(has_rows[length:].argmax())
            is_new = not has_rows[room]
            room = row_tokens if is_new else room
            per_row = room // length
            if is_new:
                rows = np.arange(num_rows, num_rows + -(-left // per_row))
                num_rows += len(rows)
            else:
                rows = open_rows[room].pop()
                has_rows[room] = bool(open_rows[room])
            # [a, b, c] with 2 samples each: a a b b c c; what is left over goes into one more row.
            full = min(len(rows), left // per_row)
            rest = left - full * per_row if full < len(rows) else 0
            placed += [np.repeat(rows[:full], per_row), np.repeat(rows[full : full + 1], rest)]
            put_back(rows[:full], room - per_row * length)
            if rest:
                put_back(rows[full : full + 1], room - rest * length)
            put_back(rows[full + bool(rest) :], room)
            left -= full * per_row + rest
    return np.concatenate(placed)


def _runs(rooms: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each room, ascending."""
    if not len(rooms):
        return []
    by_room = np.argsort(rooms, kind="stable")
    return np.split(by_room, np.flatnonzero(np.diff(rooms[by_room])) + 1)
