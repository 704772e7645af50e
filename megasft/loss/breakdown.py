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

from collections.abc import Mapping, Sequence
from typing import Final

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

WHOLE: Final = 0
POSITIONS: Final = slice(1, 1 + LAST_POSITION)
LENGTHS: Final = slice(POSITIONS.stop, POSITIONS.stop + len(LENGTH_EDGES) + 1)
CATEGORIES: Final = slice(LENGTHS.stop, None)
"""Slots of a set of rows: everything, turns by their place in the sample, turns by label tokens,
categories by ascending id, of which ``NO_CATEGORY`` is the first."""

_SET_BITS: Final = 32


def named(sums: Sequence[float]) -> dict[str, float]:
    """Return the sums of a slot by their columns, 8 or 9 of them.

    Example:
        >>> named(range(8))["ce"]
        3
    """
    columns = COLUMNS if len(sums) == len(COLUMNS) else (*COLUMNS, WEIGHTED_CE)
    return dict(zip(columns, sums, strict=True))


class Breakdown:
    """The table of this rank.

    Args:
        categories: Id to name of the categories of each set of rows: one set when training, and
            each validation set.
        objective: A name of ``OBJECTIVES``.
        has_weights: Turns have weights other than 1.
        device: Where losses are.

    Attributes:
        sums: float64 [sets, slots, 8]. What micro-batches have added so far; slots as ``WHOLE`` and
            its like say, columns as ``COLUMNS``, and ``WEIGHTED_CE`` where turns have weights.
        names: Names of the categories of each set, in the order of their slots; the first has none.
    """

    def __init__(
        self,
        categories: Sequence[Mapping[int, str]],
        *,
        objective: str,
        has_weights: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weights = OBJECTIVES[objective].weights
        of_sets = [dict(sorted({**own, NO_CATEGORY: ""}.items())) for own in categories]
        self.names = [tuple(own.values()) for own in of_sets]
        num_slots = CATEGORIES.start + max(map(len, of_sets))
        size = (len(of_sets), num_slots, len(COLUMNS) + has_weights)
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        # Categories 0 and 4 of set 1 are keys 1 << 32 and (1 << 32) + 4, ascending over all sets.
        keys = [(n << _SET_BITS) + i for n, own in enumerate(of_sets) for i in own]
        slots = [
            n * num_slots + CATEGORIES.start + k
            for n, own in enumerate(of_sets)
            for k in range(len(own))
        ]
        self._keys = torch.tensor(keys, device=device)
        self._slot_of_key = torch.tensor(slots, device=device)
        self._edges = torch.tensor(LENGTH_EDGES, dtype=torch.int32, device=device)

    def add(self, losses: torch.Tensor, batch: SFTBatch) -> None:
        """Add the losses of one share of a micro-batch.

        Args:
            losses: float [1, T] or [T]. Cross entropy per token; anything where there is no label.
            batch: The share, its per-token fields on the device of the losses.
        """
        num_columns = self.sums.shape[-1]
        has_weights = num_columns > len(COLUMNS)
        values = _values(losses.detach(), batch, self.weights(batch), has_weights=has_weights)
        for slots in self._slots(batch):
            self.sums.view(-1, num_columns).index_add_(0, slots, values)
        if len(self.sums) == 1:
            self.sums[0, WHOLE] += values.sum(dim=0)

    def _slots(self, batch: SFTBatch) -> tuple[torch.Tensor, ...]:
        """Return int64 [T] for each group: the slot of each label, counted over all sets."""
        # A row of padding has no label, so it adds zeros wherever it goes.
        set_of_row = batch.set_ids.to(self.sums.device, non_blocking=True).clamp(min=0)
        # A row gives every rank equally many tokens, and rows keep their order in a share.
        set_of_token = set_of_row.repeat_interleave(len(batch.tokens) // len(set_of_row))
        first = set_of_token * self.sums.shape[1]
        position = batch.turn_numbers.clamp(min=1, max=LAST_POSITION) + (POSITIONS.start - 1)
        length = torch.bucketize(batch.turn_tokens, self._edges, right=True) + LENGTHS.start
        keys = batch.category_ids + (set_of_token << _SET_BITS)
        place = torch.bucketize(keys, self._keys).clamp(max=len(self._keys) - 1)
        # An id the store does not name goes with those of none.
        is_named = self._keys[place] == keys
        category = torch.where(is_named, self._slot_of_key[place], first + CATEGORIES.start)
        groups = (category, first + position, first + length)
        # The whole of a single set is summed without scattering.
        return groups if len(self.sums) == 1 else (*groups, first + WHOLE)


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
