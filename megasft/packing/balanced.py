"""Sample lengths to rows that cost alike: longest first, each to the cheapest row with room.

A sample of ``n`` tokens costs ``n + n^2 / EVEN_TOKENS``: all layers but attention are linear. So
each row gets its share of the long samples and of the short, about as many samples as the others
(units per row are even too), and takes as long to train. The number of rows is the lower bound.

Samples are placed in rounds, vectorised: all rows that would get one before the cheapest gets its
second get one, the longest to the cheapest. Towards the end the roomiest row comes first instead of
the cheapest, and the shortest samples, some four a row, close the gaps by best fit. If more than a
thousandth of the rows had to be added, more samples are left to best fit, in the end all of them;
so data with few samples a row is packed as by ``best_fit.py``, and no data needs many more rows.

The weight of attention is a constant, not the model's: rows are full, so only the squares differ
between them, and one plan serves every model. Rejected: a heap over single samples (the same rows,
20 times slower).
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from megasft.packing.best_fit import fill
from megasft.packing.rows import Rows, Seed, aligned, gather, longest_first

EVEN_TOKENS: Final = 49_000
"""Length of a document whose attention costs as much as all the rest: about that of a Llama 3 8B
(``balance.LLAMA_8B``)."""
GAP_SAMPLES: Final = 4
"""Samples a row that are left to best fit; as many before them go to the roomiest row."""
ROWS_ADDED: Final = 0.001
"""Share of rows above the lower bound that is not worth a more uneven packing; one row never is."""


def balanced(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int = 1, seed: Seed = 0
) -> Rows:
    """Pack samples into rows of like cost.

    A ``Packer``; the seed decides which of equally long samples goes where. Longer samples are
    first within a row.

    Example:
        >>> lengths = np.array([30, 20, *[2] * 39])
        >>> rows = balanced(lengths, row_tokens=64)
        >>> [lengths[rows[r]][:3].tolist() for r in range(len(rows))]
        [[30, 2, 2], [20, 2, 2]]
    """
    padded = aligned(lengths, row_tokens=row_tokens, align_tokens=align_tokens)
    samples = longest_first(padded, seed=seed)
    return gather(samples, _row_of_each(padded[samples], row_tokens))


def lower_bound(padded: npt.NDArray[np.int64], *, row_tokens: int) -> int:
    """Return a number of rows below which these samples fit no packing."""
    return max(-(-int(padded.sum()) // row_tokens), int((2 * padded > row_tokens).sum()))


def _row_of_each(
    longest_to_shortest: npt.NDArray[np.int64], row_tokens: int
) -> npt.NDArray[np.int64]:
    num_rows = lower_bound(longest_to_shortest, row_tokens=row_tokens)
    num_samples = len(longest_to_shortest)
    for_gaps = GAP_SAMPLES * num_rows
    if not num_samples:
        return np.zeros(0, np.int64)
    best = _place(longest_to_shortest, row_tokens, num_rows, for_gaps)
    enough = num_rows + max(1, int(ROWS_ADDED * num_rows))
    while for_gaps < num_samples and _num_rows(best) > enough:
        for_gaps *= 2
        other = _place(longest_to_shortest, row_tokens, num_rows, for_gaps)
        best = min(best, other, key=_num_rows)
    if _num_rows(best) > num_rows:  # the rows added hold little: give them their share
        even = _place(longest_to_shortest, row_tokens, _num_rows(best), for_gaps)
        best = min(even, best, key=_num_rows)
    return best


def _num_rows(row_of: npt.NDArray[np.int64]) -> int:
    return int(row_of.max()) + 1


def _place(
    lengths: npt.NDArray[np.int64], row_tokens: int, num_rows: int, for_gaps: int
) -> npt.NDArray[np.int64]:
    """Return the row of each sample, with so many of the shortest left to best fit."""
    costs = lengths * (EVEN_TOKENS + lengths)
    row_of = np.empty(len(lengths), np.int64)
    row_costs = np.zeros(num_rows, np.int64)
    rooms = np.full(num_rows, row_tokens)
    by_room, end = (max(0, len(lengths) - times * for_gaps) for times in (2, 1))
    placed = 0
    while placed < end:
        fitting = np.flatnonzero(rooms >= lengths[placed])
        if not len(fitting):
            break  # what is left needs new rows
        is_by_cost = placed < by_room
        loads = row_costs[fitting] if is_by_cost else -rooms[fitting]
        step = costs[placed] if is_by_cost else lengths[placed]
        before_a_second = loads <= loads.min() + step
        cheapest_first = np.argsort(loads[before_a_second], kind="stable")
        rows = fitting[before_a_second][cheapest_first][: end - placed]
        now = slice(placed, placed + len(rows))
        row_of[now] = rows
        row_costs[rows] += costs[now]
        rooms[rows] -= lengths[now]
        placed += len(rows)
    histogram = np.bincount(lengths[placed:], minlength=row_tokens + 1)
    row_of[placed:] = fill(histogram, row_tokens=row_tokens, rooms=rooms)
    return row_of
