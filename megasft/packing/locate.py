"""Where a sample is trained: sample to row, row to step, step to rows; the plan read backwards.

Nothing is computed twice: rows are those of ``plan_rows`` and their order is ``RowPlan.order``,
which the training dataset reads too. Steps are counted from 1 as Megatron's log does, and a run
without batch-size ramp-up is assumed: step ``k`` trains positions ``(k - 1) B`` to ``k B - 1``.
"""

from __future__ import annotations

import numpy as np

from megasft.packing.cost_window import CostWindow
from megasft.packing.plan import RowPlan


def row_of_sample(plan: RowPlan, sample: int) -> int | None:
    """Return the (first) row that holds a sample; ``None`` when none does."""
    return next(iter(rows_of_sample(plan, sample)), None)


def rows_of_sample(plan: RowPlan, sample: int) -> list[int]:
    """Return the row of each copy of a sample, in ascending order.

    None holds it when it is longer than a row, or was not drawn by the mixture.
    """
    places = np.flatnonzero(plan.rows.samples == sample)
    rows: list[int] = (np.searchsorted(plan.rows.borders, places, "right") - 1).tolist()
    return rows


def rows_of_step(
    plan: RowPlan,
    *,
    step: int,
    global_batch_size: int,
    seed: int,
    window: CostWindow | None = None,
) -> list[int]:
    """Return the rows of a global batch, in the order of the run before they are dealt to ranks.

    Args:
        plan: The rows of the training store.
        step: Iteration, from 1 on; a run goes through epoch after epoch, so it has no end.
        global_batch_size: Rows of a step (Megatron's ``--global-batch-size``).
        seed: Seed of the run (Megatron's ``--seed``).
        window: The run's ``--megasft-cost-window``.
    """
    order = plan.order(seed=seed, window=window)
    first = (step - 1) * global_batch_size
    return [order[k] for k in range(first, first + global_batch_size)]


def first_step_of_row(
    plan: RowPlan,
    row: int,
    *,
    global_batch_size: int,
    seed: int,
    window: CostWindow | None = None,
) -> int:
    """Return the step, from 1 on, of the first epoch that trains a row."""
    order = plan.order(seed=seed, window=window)
    position = next(k for k in range(len(plan)) if order[k] == row)
    return position // global_batch_size + 1
