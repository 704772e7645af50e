"""The rows of a plan as a torch dataset: position k of the run is row ``order[k]``.

Nothing is copied ahead: a row is gathered from the memory-mapped store when it is asked for, and
ranks on one machine share the page cache. The dataset cuts the share of its own context-parallel
rank, so that only that travels from the loader's workers.

``__getitems__`` (torch calls it once per batch) returns one flat micro-batch, however many rows it
has, because packed rows have different numbers of documents and cannot be stacked. The default
collate then adds the batch dimension of 1 which Megatron expects for packed sequences.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megasft.batch.assemble import assemble, join
from megasft.batch.context_parallel import shard
from megasft.schema import SFTBatch
from megasft.store import TokenStore


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
    """What ``PackedRows`` asks of a plan: the samples of a row."""

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]: ...


class RowAtPosition(Protocol):
    """What ``PackedRows`` asks of an order: the row at a position of the run."""

    def __getitem__(self, position: int) -> int | None: ...


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of packed rows, in the order they are trained or evaluated.

    Args:
        store: Where the samples are.
        rows: Samples of each row.
        order: Row at each position of the run; ``None`` there is a row of padding.
        length: Positions of the run.
        shape: Layout of the rows on this rank.
    """

    def __init__(
        self,
        store: TokenStore,
        rows: SamplesOfRow,
        order: RowAtPosition,
        *,
        length: int,
        shape: RowShape,
    ) -> None:
        self.store, self.rows, self.order = store, rows, order
        self.length, self.shape = length, shape

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        shape = self.shape
        rows = []
        for position in positions:
            row = self.order[position]
            samples = [] if row is None else [self.store.sample(int(i)) for i in self.rows[row]]
            rows.append(
                assemble(
                    samples,
                    row_tokens=shape.row_tokens,
                    align_tokens=shape.align_tokens,
                    pad_token=shape.pad_token,
                )
            )
        share = shard(join(rows), cp_rank=shape.cp_rank, cp_size=shape.cp_size)
        return [{n: torch.from_numpy(np.ascontiguousarray(share[n])) for n in SFTBatch._fields}]


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
