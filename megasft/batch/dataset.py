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
from typing import Final, NamedTuple, Protocol

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

    Attributes:
        split: Megatron's name for what the rows are used for; its loader takes the micro-batch
            size of evaluations only where it is that of validation.
    """

    split: object = None

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
        _keep_freed_memory()  # forked workers inherit it

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        rows = [self._samples_of(position) for position in positions]
        samples = self.store.samples(np.concatenate(rows))
        return [_micro_batch(samples, [len(row) for row in rows], self.shape)]

    def _samples_of(self, position: int) -> npt.NDArray[np.int64]:
        row = self.order[position]
        return np.zeros(0, np.int64) if row is None else self.rows[row]


class RowsOfStore(NamedTuple):
    """A store, and which of its samples make which row."""

    store: TokenStore
    rows: SamplesOfRow
    num_rows: int


class RowsOfSets(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of several validation sets, whose rows are numbered through.

    A micro-batch has one field more than an ``SFTBatch``: ``set_of_row``, int64 [rows], the set
    each row is of, -1 for padding. Category ids are those of the row's own store.

    Args:
        sets: The stores and their rows.
        order: Row at each position of the run; ``None`` there is a row of padding.
        length: Positions of the run.
        shape: Layout of the rows on this rank.

    Attributes:
        split: As of ``PackedRows``.
    """

    split: object = None

    def __init__(
        self, sets: Sequence[RowsOfStore], order: RowAtPosition, *, length: int, shape: RowShape
    ) -> None:
        self.sets, self.order = tuple(sets), order
        self.length, self.shape = length, shape
        _keep_freed_memory()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, torch.Tensor]]:
        found = [self._samples_of(self.order[position]) for position in positions]
        parts = [samples for _, samples in found]
        joined = Samples(
            [tokens for samples in parts for tokens in samples.tokens],
            np.concatenate([samples.turns for samples in parts]),
            np.concatenate([samples.num_turns for samples in parts]),
        )
        batch = _micro_batch(joined, [len(samples.tokens) for samples in parts], self.shape)
        return [batch | {"set_of_row": torch.tensor([number for number, _ in found])}]

    def _samples_of(self, row: int | None) -> tuple[int, Samples]:
        if row is None:
            return -1, self.sets[0].store.samples(np.zeros(0, np.int64))
        number = 0
        while row >= self.sets[number].num_rows:
            row -= self.sets[number].num_rows
            number += 1
        store, rows, _ = self.sets[number]
        return number, store.samples(rows[row])


def _micro_batch(
    samples: Samples, samples_per_row: Sequence[int], shape: RowShape
) -> dict[str, torch.Tensor]:
    whole = assemble(
        samples,
        row_tokens=shape.row_tokens,
        align_tokens=shape.align_tokens,
        pad_token=shape.pad_token,
        samples_per_row=samples_per_row,
    )
    share = shard(whole, cp_rank=shape.cp_rank, cp_size=shape.cp_size)
    return {name: torch.from_numpy(share[name]) for name in SFTBatch._fields}


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
