"""The rows of a plan as a torch dataset: position k of the run is row ``order[k]``.

Nothing is copied ahead: a row is gathered from the memory-mapped store when it is asked for, and
ranks on one machine share the page cache. The dataset cuts the share of its own context-parallel
rank, so that only that travels from the loader's workers.

``__getitems__`` (torch calls it once per batch) returns one flat micro-batch, however many rows it
has, because packed rows have different numbers of documents and cannot be stacked. The default
collate then adds the batch dimension of 1 which Megatron expects for packed sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megasft.batch.assemble import assemble
from megasft.batch.context_parallel import shard
from megasft.schema import SFTBatch
from megasft.store import Samples, TokenStore

_KEPT_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class RowShape:
    """How rows are laid out on this rank; sizes in tokens.

    Attributes:
        row_tokens: Tokens of a row.
        align_tokens: Multiple of every document's length.
        pad_token: Id to fill gaps with.
        cp_rank: This rank's place in its context-parallel group.
        cp_size: Ranks that share one row.
    """

    row_tokens: int
    align_tokens: int
    pad_token: int
    cp_rank: int = 0
    cp_size: int = 1


class SamplesOfRow(Protocol):
    """What ``PackedRows`` asks of a plan: the samples of a row, and how many rows there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]: ...


class RowAtPosition(Protocol):
    """What ``PackedRows`` asks of an order: the row at a position of the run."""

    def __getitem__(self, position: int) -> int | None: ...


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of packed rows, in the order they are trained or evaluated.

    Args:
        sets: Stores, and which of their samples make which row: one in training, and those of all
            validation sets. Rows are numbered through; category ids are those of a row's own store.
        order: Row at each position of the run; ``None`` there is a row of padding.
        length: Positions of the run.
        shape: Layout of the rows on this rank.

    Attributes:
        split: Megatron's name for what the rows are used for; its loader takes the micro-batch
            size of evaluations only where it is that of validation.
    """

    split: object = None

    def __init__(
        self,
        sets: Sequence[tuple[TokenStore, SamplesOfRow]],
        order: RowAtPosition,
        *,
        length: int,
        shape: RowShape,
    ) -> None:
        self.sets, self.order = tuple(sets), order
        self.first_rows = np.cumsum([0, *(len(rows) for _, rows in sets)])
        self.length, self.shape = length, shape
        _keep_freed_memory()  # forked workers inherit it

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        found = [self.order[position] for position in positions]
        row_ids = np.array([-1 if row is None else row for row in found], np.int64)
        # Sets of 3 and 2 rows, first_rows [0, 3, 5]: rows 2, 3 and -1 are of sets 0, 1 and -1.
        set_ids = np.searchsorted(self.first_rows, row_ids, side="right") - 1
        parts = [
            self._samples_of(row, number)
            for row, number in zip(row_ids.tolist(), set_ids.tolist(), strict=True)
        ]
        whole = assemble(
            Samples(
                [tokens for samples in parts for tokens in samples.tokens],
                np.concatenate([samples.turns for samples in parts]),
                np.concatenate([samples.num_turns for samples in parts]),
            ),
            row_tokens=self.shape.row_tokens,
            align_tokens=self.shape.align_tokens,
            pad_token=self.shape.pad_token,
            samples_per_row=[len(samples.tokens) for samples in parts],
        )
        share = shard(whole, cp_rank=self.shape.cp_rank, cp_size=self.shape.cp_size)
        share |= {"row_ids": row_ids, "set_ids": set_ids}
        return [{name: torch.from_numpy(share[name]) for name in SFTBatch._fields}]

    def _samples_of(self, row: int, number: int) -> Samples:
        store, rows = self.sets[max(number, 0)]
        own = np.zeros(0, np.int64) if row < 0 else rows[row - self.first_rows[number]]
        return store.samples(own)


def _keep_freed_memory() -> None:
    """Have the C library keep what a micro-batch frees, for the next one.

    Giving 5 MB back to the kernel and faulting them in again takes longer than to fill them. glibc
    keeps up to twice the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD), so it is shown
    one that exceeds any micro-batch; other C libraries do not mind.
    """
    np.empty(_KEPT_BYTES // 2, np.uint8)


class WholeSet:
    """Every row once per pass, then padding up to whole global batches, again and again.

    Validation sets of any size are evaluated whole: what a global batch lacks is filled with rows
    that weigh nothing. Passes follow each other, so wherever a pass starts it sees each row once.

    Example:
        >>> order = WholeSet(num_rows=3, period=4)
        >>> [order[k] for k in range(5)]
        [0, 1, 2, None, 0]
    """

    def __init__(self, *, num_rows: int, period: int) -> None:
        self.num_rows, self.period = num_rows, period

    def __getitem__(self, position: int) -> int | None:
        place = position % self.period
        return place if place < self.num_rows else None
