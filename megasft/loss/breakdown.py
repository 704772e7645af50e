"""Sums of a step's losses by category, turn position and turn length, in one table of fixed size.

Each label falls into one slot of every group (everything, its category, its turn's place in the
sample, its turn's length), and a slot holds the same eight sums, so that a table of any step, on
any rank, adds to any other: one all-reduce serves all of them, and a category without labels is a
row of zeros, never 0 / 0. Micro-batches add on the device: no host sync, no loop over tokens.

A table costs slots x 8 doubles whatever the batch. Rejected: a reported pair for each category,
which Megatron reduces one by one and divides without a clamp.

Means by token, turn and sample are plain, also where turns have weights; what is optimised has a
column of its own then.

Sums are float64, so that they are the same on every layout to many digits more than are printed.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from megasft.loss.objectives import OBJECTIVES, has_label
from megasft.schema import NO_CATEGORY, SFTBatch

COLUMNS: Final = (
    *("labels", "turns", "samples", "ce", "ce_per_turn", "ce_per_sample", "p", "weighted_p_ce"),
)
"""Sums of a slot: three counts; cross entropy as the token, turn and sample mean weigh it; the
probability of the label; cross entropy times probability as the run's objective weighs it (what
dynamic fine-tuning optimises)."""

WEIGHTED_CE: Final = "weighted_ce"
"""A ninth sum where turns have weights: cross entropy as the run's objective and they weigh it."""

LAST_POSITION: Final = 8
"""Turns of a sample from this one on share a slot."""

LENGTH_EDGES: Final = (16, 64, 256, 1024, 4096, 16384)
"""Label tokens at which the next slot of turn lengths begins."""

_SET_BITS: Final = 32


def named(sums: Sequence[float]) -> dict[str, float]:
    """Return the sums of a slot by their columns, 8 or 9 of them.

    Example:
        >>> named(range(8))["ce"]
        3
    """
    columns = COLUMNS if len(sums) == len(COLUMNS) else (*COLUMNS, WEIGHTED_CE)
    return dict(zip(columns, sums, strict=True))


class Span(NamedTuple):
    """Rows of the table, from ``start`` to before ``stop``."""

    start: int
    stop: int


class SlotsOfSet(NamedTuple):
    """Where the sums of one set of rows are: the training rows, or one validation set.

    Attributes:
        whole: The row of everything.
        categories: Rows of the categories, in the order of ``category_ids``.
        category_ids: Ascending; the first is ``NO_CATEGORY``.
        positions: Rows of turn 1, 2, ... of their sample.
        lengths: Rows of turns by label tokens.
    """

    whole: int
    categories: Span
    category_ids: tuple[int, ...]
    positions: Span
    lengths: Span


class Breakdown:
    """The table of this rank, and where its slots are.

    Args:
        categories: Ids of the categories of each set of rows; one set when training.
        objective: A name of ``OBJECTIVES``.
        has_weights: Turns have weights other than 1.
        device: Where losses are.

    Attributes:
        sums: float64 [slots, 8]. What micro-batches have added so far; columns as ``COLUMNS``, and
            ``WEIGHTED_CE`` where turns have weights.
        sets: The slots of each set.
    """

    def __init__(
        self,
        categories: Sequence[Sequence[int]],
        *,
        objective: str,
        has_weights: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weights = OBJECTIVES[objective].weights
        self.sets = slots_of_sets(categories)
        size = (self.sets[-1].lengths.stop, len(COLUMNS) + has_weights)
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        keys = [(n << _SET_BITS) + i for n, one in enumerate(self.sets) for i in one.category_ids]
        self._keys = torch.tensor(keys, device=device)
        self._edges = torch.tensor(LENGTH_EDGES, dtype=torch.int32, device=device)

    def add(
        self, losses: torch.Tensor, batch: SFTBatch, *, set_of_row: torch.Tensor | None = None
    ) -> None:
        """Add the losses of one share of a micro-batch.

        Args:
            losses: float [1, T] or [T]. Cross entropy per token; anything where there is no label.
            batch: The share, on the device of the losses.
            set_of_row: int64 [rows]. The set each row is of, -1 for padding; one set without it.
        """
        has_weights = self.sums.shape[1] > len(COLUMNS)
        values = _values(losses.detach(), batch, self.weights(batch), has_weights=has_weights)
        set_of_token = None
        if set_of_row is not None:
            # A row gives every rank equally many tokens, and rows keep their order in a share.
            row_tokens = len(batch.tokens) // len(set_of_row)
            own = set_of_row.to(self.sums.device).clamp(min=0)
            set_of_token = own.repeat_interleave(row_tokens)
        for slots in self._slots(batch, set_of_token):
            self.sums.index_add_(0, slots, values)
        if set_of_token is None:
            self.sums[self.sets[0].whole] += values.sum(dim=0)

    def _slots(
        self, batch: SFTBatch, set_of_token: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Return the row of the table each label falls into, for each group."""
        first = self.sets[0]
        position = batch.turn_numbers.clamp(min=1, max=LAST_POSITION) + (first.positions.start - 1)
        length = torch.bucketize(batch.turn_tokens, self._edges, right=True, out_int32=True)
        length += first.lengths.start
        keys = batch.category_ids.long()
        if set_of_token is None:
            return self._category(keys, torch.zeros_like(keys)), position, length
        of_set = set_of_token << _SET_BITS
        return (
            self._category(keys + of_set, of_set),
            position + set_of_token * LAST_POSITION,
            length + set_of_token * (len(LENGTH_EDGES) + 1),
            set_of_token + first.whole,
        )

    def _category(self, keys: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
        """Return the rows of categories; an id the store does not name goes with those of none."""
        place = torch.bucketize(keys, self._keys).clamp(max=len(self._keys) - 1)
        place = torch.where(self._keys[place] == keys, place, torch.bucketize(none, self._keys))
        return place + self.sets[0].categories.start


def slots_of_sets(categories: Sequence[Sequence[int]]) -> list[SlotsOfSet]:
    """Lay out the table: all wholes, then all categories, all positions, all lengths.

    Args:
        categories: Ids of the categories of each set.

    Example:
        >>> slots_of_sets([[4]])[0].category_ids, slots_of_sets([[4]])[0].categories
        ((0, 4), Span(start=1, stop=3))
    """
    ids = [tuple(sorted({NO_CATEGORY, *own})) for own in categories]
    lengths = len(LENGTH_EDGES) + 1
    num_sets, num_categories = len(ids), sum(map(len, ids))
    at_category, at_position = num_sets, num_sets + num_categories
    at_length = at_position + num_sets * LAST_POSITION
    slots = []
    for n, own in enumerate(ids):
        position, length = at_position + n * LAST_POSITION, at_length + n * lengths
        slots.append(
            SlotsOfSet(
                n,
                Span(at_category, at_category + len(own)),
                own,
                Span(position, position + LAST_POSITION),
                Span(length, length + lengths),
            )
        )
        at_category += len(own)
    return slots


def _values(
    losses: torch.Tensor, batch: SFTBatch, weights: torch.Tensor, *, has_weights: bool
) -> torch.Tensor:
    """Return float64 [T, 8], or 9 with weights: what each label adds to its slots."""
    labelled = has_label(batch)
    # Padding may hold nan, and 0 * nan is nan: select, do not multiply.
    ce = torch.where(labelled, losses.reshape(-1).double(), 0.0)
    p = torch.where(labelled, torch.exp(-ce), 0.0)
    columns = (
        *(labelled, batch.ends_turn, batch.ends_sample, ce),
        *(ce / batch.turn_tokens.clamp(min=1), ce / batch.sample_tokens.clamp(min=1)),
        *(p, ce * p * weights),
        *([ce * weights] if has_weights else ()),
    )
    return torch.stack([column.to(torch.float64) for column in columns], dim=1)
