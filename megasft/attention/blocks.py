"""Which queries meet which keys when a row is computed share by share. Index arithmetic only.

With zigzag ownership a rank's share of a document is a front and a back slice, and the meeting of
this rank's queries with the keys of rank ``j`` is one of three rectangles per document, none of
which needs a mask that a plain attention kernel lacks:

    j == rank    all queries x all keys, causal: the share keeps the order of positions
    j <  rank    all queries x the front half of the keys, everything visible
    j >  rank    the back half of the queries x all keys, everything visible

Every pair costs the same, so no rank waits for another. Rejected: keys in row order with a causal
mask aligned at the end, because most kernels align it at the start or need an explicit mask.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megasft.cp_layout import Span, attention_spans, zigzag_positions

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Queries and keys in pieces, one per document; piece ``i`` sees piece ``i`` only.

    Attributes:
        borders_q: Borders of the pieces in the block's queries; starts at 0.
        borders_k: Borders of the pieces in the block's keys.
        is_causal: Query and key ``n`` of a piece are the same token, and causal; otherwise every
            query sees every key of its piece, but for the window.
        positions_q: int64 [queries]. Row positions; a later key is never visible.
        positions_k: int64 [keys].
        window: How many keys before its own position a query sees; None for all.
        is_whole_row: Positions run without gaps, so the window can be counted in indices.
        device: Where the tensors live.
    """

    borders_q: tuple[int, ...]
    borders_k: tuple[int, ...]
    is_causal: bool
    positions_q: Positions
    positions_k: Positions
    window: int | None
    is_whole_row: bool
    device: torch.device

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """int32 [D + 1], on the device."""
        return torch.tensor(self.borders_q, dtype=torch.int32).to(self.device)

    @cached_property
    def cu_seqlens_k(self) -> torch.Tensor:
        """int32 [D + 1], on the device."""
        return torch.tensor(self.borders_k, dtype=torch.int32).to(self.device)

    @cached_property
    def longest_q(self) -> int:
        """Queries of the longest piece."""
        return max(b - a for a, b in pairwise(self.borders_q))

    @cached_property
    def longest_k(self) -> int:
        """Keys of the longest piece."""
        return max(b - a for a, b in pairwise(self.borders_k))

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of equal size together: indices int64 [pieces, queries] and [pieces, keys]."""
        starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        pieces = zip(pairwise(self.borders_q), pairwise(self.borders_k), strict=True)
        for (q_start, q_end), (k_start, k_end) in pieces:
            if q_end > q_start and k_end > k_start:
                size = (q_end - q_start, k_end - k_start)
                starts.setdefault(size, []).append((q_start, k_start))
        return [
            (
                self._indices([q for q, _ in firsts], size_q),
                self._indices([k for _, k in firsts], size_k),
            )
            for (size_q, size_k), firsts in starts.items()
        ]

    def _indices(self, starts: list[int], size: int) -> torch.Tensor:
        return (torch.tensor(starts)[:, None] + torch.arange(size)).to(self.device)


class Step(NamedTuple):
    """This rank's queries against the keys of one rank.

    Attributes:
        source: The rank that owns the keys.
        block: Who sees whom.
        q_rows: int64. The queries of the block, in the share's order; None for all.
        k_rows: int64. The keys of the block, in the source's share; None for all.
    """

    source: int
    block: Block
    q_rows: torch.Tensor | None
    k_rows: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A row's borders and its cut over the ranks, with what all layers derive from them.

    Attributes:
        borders: Aligned document borders of the whole flat micro-batch; starts at 0.
        cp_rank: This rank's place in its context-parallel group.
        cp_size: Ranks that share the row.
        device: Where index tensors live.
    """

    borders: tuple[int, ...]
    cp_rank: int
    cp_size: int
    device: torch.device
    _steps: dict[int | None, tuple[Step, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def spans(self) -> list[Span]:
        """What each run of this rank's queries attends to, keys in row order."""
        borders = np.asarray(self.borders)
        return attention_spans(borders, cp_rank=self.cp_rank, cp_size=self.cp_size)

    @cached_property
    def order(self) -> torch.Tensor:
        """Where each row position lies in the gathered shares."""
        return row_order(self.borders, cp_size=self.cp_size).to(self.device)

    def window_that_matters(self, window: int | None) -> int | None:
        """Return None for a window no document of this row reaches beyond."""
        longest = max(b - a for a, b in pairwise(self.borders))
        return None if window is None or longest <= window + 1 else window

    def steps(self, window: int | None) -> tuple[Step, ...]:
        """Return this rank's meetings in the order of the ring: its own keys first.

        Step ``s`` meets the keys of rank ``(cp_rank - s) % cp_size``.
        """
        if window not in self._steps:
            sources = ((self.cp_rank - s) % self.cp_size for s in range(self.cp_size))
            self._steps[window] = tuple(self._step(j, window) for j in sources)
        return self._steps[window]

    def _step(self, source: int, window: int | None) -> Step:
        share = np.asarray(self.borders) // self.cp_size
        half = share // 2
        front, back = _halves(share) if source != self.cp_rank else (None, None)
        q_rows = back if source > self.cp_rank else None
        k_rows = front if source < self.cp_rank else None
        block = Block(
            borders_q=tuple((share if q_rows is None else half).tolist()),
            borders_k=tuple((share if k_rows is None else half).tolist()),
            is_causal=source == self.cp_rank,
            positions_q=self._positions(self.cp_rank, q_rows),
            positions_k=self._positions(source, k_rows),
            window=window,
            is_whole_row=self.cp_size == 1,
            device=self.device,
        )
        return Step(source, block, self._index(q_rows), self._index(k_rows))

    def _positions(self, rank: int, rows: Positions | None) -> Positions:
        borders = np.asarray(self.borders)
        positions = zigzag_positions(borders, cp_rank=rank, cp_size=self.cp_size)
        return positions if rows is None else positions[rows]

    def _index(self, rows: Positions | None) -> torch.Tensor | None:
        return None if rows is None else torch.from_numpy(rows).to(self.device)


def row_order(borders: tuple[int, ...], *, cp_size: int) -> torch.Tensor:
    """Return where each row position lies in the shares laid end to end.

    Args:
        borders: Aligned document borders of the whole row; starts at 0.
        cp_size: Ranks that share the row.

    Returns:
        int64 [T of the whole row]: ``gathered[order]`` is in row order.

    Example:
        >>> row_order((0, 8), cp_size=2).tolist()      # shares: 0 1 6 7 | 2 3 4 5
        [0, 1, 4, 5, 6, 7, 2, 3]
    """
    cu_seqlens = np.asarray(borders)
    shares = [zigzag_positions(cu_seqlens, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    return torch.from_numpy(np.argsort(np.concatenate(shares)))


def _halves(share: Positions) -> tuple[Positions, Positions]:
    """Return the indices of all front slices and of all back slices of a share.

    Example:
        >>> [half.tolist() for half in _halves(np.array([0, 2, 6]))]
        [[0, 2, 3], [1, 4, 5]]
    """
    sizes = np.diff(share)
    offset = np.arange(share[-1]) - np.repeat(share[:-1], sizes)
    is_front = offset < np.repeat(sizes // 2, sizes)
    return np.flatnonzero(is_front), np.flatnonzero(~is_front)
