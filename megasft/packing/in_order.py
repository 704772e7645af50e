"""Sample lengths to rows without moving samples: neighbours share a row, or each has its own.

For data whose order means something (chapters, a curriculum written into the file), and for
comparing with a framework that does not pack. Both waste tokens; the summary of the plan says how
many. Rows themselves are still shuffled before they are trained (``order.py``).
"""

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from megasft.packing.rows import Rows, Seed, aligned


def sequential(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int = 1, seed: Seed = 0
) -> Rows:
    """Fill row after row with the samples as they come; a ``Packer`` that needs no seed.

    Example:
        >>> rows = sequential(np.array([5, 3, 2]), row_tokens=8)
        >>> [rows[r].tolist() for r in range(len(rows))]
        [[0, 1], [2]]
    """
    padded = aligned(lengths, row_tokens=row_tokens, align_tokens=align_tokens)
    ends = np.cumsum(padded).tolist()
    borders, before = [0], 0
    while borders[-1] < len(ends):
        borders.append(bisect_right(ends, before + row_tokens, lo=borders[-1]))
        before = ends[borders[-1] - 1]
    return Rows(np.arange(len(lengths)), np.array(borders, np.int64))


def one_each(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int = 1, seed: Seed = 0
) -> Rows:
    """Give each sample a row of its own; a ``Packer`` that needs no seed."""
    aligned(lengths, row_tokens=row_tokens, align_tokens=align_tokens)
    return Rows(np.arange(len(lengths)), np.arange(len(lengths) + 1))
