"""What the row plan knows of the global batch in training, before a single token is read.

Which rows a step trains follows from Megatron's consumed samples alone, and the plan counts what
each row holds. So every rank knows the units, labels and size of the whole global batch without
communication: the audit compares them with what Megatron reduced, and the side losses are scaled
by them. So are the weights of turns, where they are normalized: the factor is that of the global
batch on every rank and in each of its micro-batches, whatever the layout.
"""

from typing import Any, NamedTuple

from megasft.loss.objectives import weight_scale
from megasft.megatron import loop
from megasft.packing.cost_window import CostWindow
from megasft.packing.plan import RowPlan


class GlobalBatch(NamedTuple):
    """Contents of one global batch, over all ranks and micro-batches.

    Attributes:
        rows: Rows of the plan, in the order of the run before they are distributed to ranks.
        units: What the loss is divided by.
        labels: Label tokens.
        positions: Tokens, padding counted.
        weight_scale: What the loss is multiplied by: units over the sum of their weights where
            weights are normalized, else 1.
    """

    rows: tuple[int, ...]
    units: int
    labels: int
    positions: int
    weight_scale: float = 1.0


class GlobalBatches:
    """The global batch at a position of the run; remembers the last one asked for.

    Args:
        plan: The rows of the training store.
        seed: Seed of the run's order, as the dataset has it.
        objective: A name of ``OBJECTIVES``.
        window: The run's cost window; it changes which rows make a global batch.
        normalizes: Weights of turns are normalized.
    """

    def __init__(
        self,
        plan: RowPlan,
        *,
        seed: int,
        objective: str,
        window: CostWindow | None = None,
        normalizes: bool = False,
    ) -> None:
        self.plan = plan
        self.order = plan.order(seed=seed, window=window)
        self.units_of_row = plan.units[objective]
        self.weights_of_row = plan.unit_weights[objective] if normalizes else None
        self._last: tuple[tuple[int, int], GlobalBatch] | None = None

    def at(self, position: int, *, num_rows: int) -> GlobalBatch:
        """Return what the rows from ``position`` on hold together.

        Args:
            position: Rows consumed before this step.
            num_rows: Rows of the step.
        """
        key = (position, num_rows)
        if self._last is None or self._last[0] != key:
            rows = [self.order[k] for k in range(position, position + num_rows)]
            units, labels = (int(v[rows].sum()) for v in (self.units_of_row, self.plan.labels))
            positions = num_rows * self.plan.row_tokens
            scale = 1.0
            if self.weights_of_row is not None:
                scale = weight_scale(units, float(self.weights_of_row[rows].sum()))
            self._last = (key, GlobalBatch(tuple(rows), units, labels, positions, scale))
        return self._last[1]

    def now(self, args: Any) -> GlobalBatch:
        """Return the global batch Megatron is training.

        Args:
            args: Megatron's flags; it counts the consumed rows there, after each step.
        """
        return self.at(int(args.consumed_train_samples), num_rows=loop.batch_size())
