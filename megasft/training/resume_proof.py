"""Counts how often each row is trained when one layout ends at a checkpoint and another goes on.

Of the steps before the checkpoint only their batch size and layout at the time of saving are known.
If the run changed them within the epoch, the rows of steps that cannot be replayed are taken from
the plan, which is right as each global batch trains the rows of its positions on any layout; how
many is told (``Proof.num_unseen``).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.plan import RowPlan
from megasft.training import row_order
from megasft.training.replay import Step, replay, step_starts


class Epoch(NamedTuple):
    """An epoch's number, from 0, and its positions ``[first, end)``."""

    number: int
    first: int
    end: int


class Proof(NamedTuple):
    """What a replay of the epochs around a checkpoint shows; all counts are of rows.

    Attributes:
        epochs: That of the last row trained and that of the next one; often the same.
        num_before: Trained before the checkpoint in these epochs.
        num_to_come: Trained after it in these epochs.
        num_unseen: Of those before, taken from the plan since their steps cannot be replayed.
        num_repeated: Times a row is trained too often.
        num_skipped: Times a row is trained too seldom.
        num_steps: Steps replayed, before and after the checkpoint.
        odd_step: Position of the first step whose ranks do not train the rows of the plan.
        next_step: The first step after the checkpoint.
    """

    epochs: tuple[Epoch, ...]
    num_before: int
    num_to_come: int
    num_unseen: int
    num_repeated: int
    num_skipped: int
    num_steps: tuple[int, int]
    odd_step: int | None
    next_step: Step

    @property
    def is_exact(self) -> bool:
        """Say whether each row is trained once in each epoch, in the step the plan has it in."""
        return self.num_repeated == self.num_skipped == 0 and self.odd_step is None


def prove_rows(old: Any, new: Any, plan: RowPlan) -> Proof:
    """Replay the epochs around a checkpoint and count how often each row is trained.

    Args:
        old: Megatron's flags as the checkpoint holds them, consumed samples among them.
        new: Flags of the run to come, validated.
        plan: The rows of both.
    """
    consumed = int(old.consumed_train_samples)
    epochs = tuple(dict.fromkeys(epoch_at(plan, k) for k in (max(0, consumed - 1), consumed)))
    first, end = epochs[0].first, epochs[-1].end
    starts = step_starts(old, start=first, end=consumed)
    seen = starts[0] if starts else consumed
    tally = _Tally(new, plan)
    tally.take(range(first, seen))
    before = tally.train(replay(old, plan, start=seen, end=consumed))
    (next_step,) = replay(new, plan, start=consumed, end=consumed + 1)
    after = tally.train(replay(new, plan, start=consumed, end=end))
    # The first and the last step may reach into other epochs.
    tally.take(range(seen, first), times=-1)
    tally.take(range(end, tally.position), times=-1)
    expected = np.zeros(len(plan), np.int64)
    for epoch in epochs:
        start = epoch.first % len(plan)
        expected[start : start + epoch.end - epoch.first] += 1
    return Proof(
        epochs=epochs,
        num_before=consumed - first,
        num_to_come=end - consumed,
        num_unseen=max(0, seen - first),
        num_repeated=int(np.maximum(tally.times - expected, 0).sum()),
        num_skipped=int(np.maximum(expected - tally.times, 0).sum()),
        num_steps=(before, after),
        odd_step=tally.odd_step,
        next_step=next_step,
    )


def epoch_at(plan: RowPlan, position: int) -> Epoch:
    """Return the epoch a position is in; with several packings each epoch has rows of its own."""
    turn, place = divmod(position, len(plan))
    per_epoch = (len(plan.stages) - 1) // plan.num_packings
    borders = plan.stages[::per_epoch]
    packing = int(np.searchsorted(borders, place, side="right")) - 1
    start = turn * len(plan)
    number = turn * plan.num_packings + packing
    return Epoch(number, start + borders[packing], start + borders[packing + 1])


class _Tally:
    """How often each row of the plan is trained, and whether each step trains the plan's rows."""

    def __init__(self, args: Any, plan: RowPlan) -> None:
        # What the audit of a run compares its steps with.
        self.batches = GlobalBatches(
            plan,
            seed=args.seed,
            objective=args.megasft_loss,
            window=row_order.cost_window(args),
        )
        self.times = np.zeros(len(plan), np.int64)
        self.position = 0
        self.odd_step: int | None = None

    def take(self, positions: range, *, times: int = 1) -> None:
        """Count the rows that the plan has at positions."""
        for position in positions:
            self.times[self.batches.order[position]] += times

    def train(self, steps: Iterable[Step]) -> int:
        """Count the rows of steps, and return how many steps they were."""
        number = 0
        for number, step in enumerate(steps, start=1):  # noqa: B007
            rows = step.rows
            np.add.at(self.times, rows, 1)
            planned = self.batches.at(step.position, num_rows=len(rows)).rows
            if self.odd_step is None and sorted(rows) != sorted(planned):
                self.odd_step = step.position
            self.position = step.position + len(rows)
        return number
