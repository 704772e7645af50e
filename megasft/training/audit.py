"""Compares the units Megatron divided by with the units the row plan knows, at every step.

A loss that is wrong by a count looks like any other loss: labels lost at a seam, a rank counted
twice, rows read in another order. The plan knows the units of each global batch before it is
trained, and Megatron leaves the number it reduced over all ranks in the tensor it was given
(``finalize_model_grads``), so comparing them costs no collective: one integer read from the device,
just before the gradient norm is read from it anyway. An evaluation is compared with the whole of
each validation store, by the table that is summed over all ranks for its report.

Weights of turns change no count: a turn of weight 0.5 is one turn. Where they are normalized, the
factor comes from the plan that the count is compared with.
"""

from collections.abc import Mapping, Sequence

from megasft.errors import AuditError
from megasft.loss.objectives import OBJECTIVES
from megasft.megatron.global_batch import GlobalBatch
from megasft.packing.plan import RowPlan

ROWS_NAMED = 16
"""Rows a message names at most."""


def audit(*, step: int, reduced: int, batch: GlobalBatch, objective: str) -> None:
    """Stop the run when the units of a step are not those of its rows.

    Args:
        step: Number of the step, counted from 1 as Megatron's log does.
        reduced: What Megatron summed over micro-batches, data- and context-parallel ranks.
        batch: What the plan knows of the step.
        objective: A name of ``OBJECTIVES``.

    Raises:
        AuditError: The two numbers differ.
    """
    if reduced == batch.units:
        return
    raise AuditError(
        f"step {step}: Megatron reduced {reduced:,} {OBJECTIVES[objective].unit} over all ranks, "
        f"and the rows of this global batch hold {batch.units:,} (rows {_some(batch.rows)} of the "
        "plan); the loss and its gradient would be divided by a wrong number. A data loader, loss "
        "or batch of your own is the likely cause; --megasft-no-audit trains on regardless"
    )


def audit_evaluation(*, step: int, name: str, found: Mapping[str, float], plan: RowPlan) -> None:
    """Stop the run when an evaluation did not read each row of a validation store once.

    Args:
        step: Steps trained before the evaluation.
        name: Of the validation store.
        found: Sums over all ranks by name of the column, see ``megasft.loss.breakdown``.
        plan: The rows of the store.

    Raises:
        AuditError: Turns, samples or labels are not those of the rows.
    """
    held = {"turns": plan.turns, "samples": plan.labelled_samples, "labels": plan.labels}
    wrong = [
        f"{round(found[unit]):,} {unit}, and its rows hold {int(of_row.sum()):,}"
        for unit, of_row in held.items()
        if round(found[unit]) != int(of_row.sum())
    ]
    if wrong:
        raise AuditError(
            f"step {step}: the evaluation of {name} read {'; '.join(wrong)}; its losses would be "
            "those of other data. A data loader, loss or batch of your own is the likely cause; "
            "--megasft-no-audit goes on regardless"
        )


def _some(rows: Sequence[int]) -> str:
    named = ", ".join(map(str, rows[:ROWS_NAMED]))
    more = len(rows) - ROWS_NAMED
    return f"{named} and {more} more" if more > 0 else named
