"""What a training run on planned rows will see: an epoch, its steps, and how even their work is.

All of it is computed from the row plan that trains and from the order and the deal that train, so
the numbers are those of the log. Rejected: estimates from the distribution of lengths, which need
no plan and are wrong where it matters, at the last row, the longest sample and the dearest step.

A step of the forecast is a step of the first pass over the plan; the last one goes on into the next
pass, as the run does. How even ranks are is looked at on the first ``BATCHES_LOOKED_AT`` global
batches, because a deal of large batches takes some milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megasft.packing.balance import BatchShape, Cost, DealtOrder, slowest_over_mean
from megasft.packing.cost_window import CostWindow
from megasft.packing.order import RowAtPosition
from megasft.packing.pack import DEFAULT_PACKER
from megasft.packing.plan import RowPlan
from megasft.schema import TURN_FIELDS
from megasft.store import TokenStore

Counts = npt.NDArray[np.int64]
Ratios = npt.NDArray[np.float64]

BATCHES_LOOKED_AT: Final = 50
"""Global batches the predicted imbalance is averaged over."""


@dataclass(frozen=True, slots=True)
class Run:
    """What of a run's flags decides which rows a step trains, and on how many ranks.

    Attributes:
        shape: How a global batch is split.
        seed: Megatron's ``--seed``.
        packer: The run's ``--megasft-packer``.
        cp_size: Ranks that share one row.
        tp_size: Tensor-parallel ranks.
        pp_size: Pipeline stages.
        sequence_parallel: Whether activations are cut over the tensor-parallel ranks as well.
        window: The run's ``--megasft-cost-window``.
    """

    shape: BatchShape
    seed: int
    packer: str = DEFAULT_PACKER
    cp_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    sequence_parallel: bool = False
    window: CostWindow | None = None

    @property
    def pass_rows(self) -> int:
        """Rows that all data-parallel ranks train at once, a micro-batch each."""
        return self.shape.dp_size * self.shape.micro_batch_size

    @property
    def num_micro_batches(self) -> float:
        """Micro-batches a rank trains in a step; a fraction is what Megatron refuses."""
        return self.shape.global_batch_size / self.pass_rows


class Spread(NamedTuple):
    """The least, the mean and the most of something."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Self:
        """Measure a non-empty array."""
        return cls(float(values.min()), float(values.mean()), float(values.max()))


class Padding(NamedTuple):
    """Tokens of the plan's rows that are no tokens of a sample.

    Attributes:
        alignment: Inside documents, up to the next multiple of the alignment.
        gaps: Behind the last document of a row.
    """

    alignment: int
    gaps: int


class TooLong(NamedTuple):
    """Samples that fit no row.

    Attributes:
        num_samples: How many.
        tokens: Tokens of all of them.
        longest: Tokens of the longest.
        first: The first of them in the store; -1 when there is none.
    """

    num_samples: int
    tokens: int
    longest: int
    first: int


class Steps(NamedTuple):
    """int64 [N] each. What each step of the first pass over the plan trains."""

    turns: Counts
    tokens: Counts
    labels: Counts


class Balance(NamedTuple):
    """float64 [N] each. Slowest data-parallel rank over the mean of ranks, by global batch.

    Attributes:
        before: Rows trained where they come.
        after: Rows of each global batch dealt to ranks by cost.
    """

    before: Ratios
    after: Ratios


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will see.

    Attributes:
        plan: The rows.
        run: On which ranks and in which batches they are trained.
        lengths: int64 [P]. True tokens of each sample placed.
        samples_per_row: int64 [R].
        row_costs: float64 [R]. Operations of training each row.
        padding: Tokens that are padding, by where they are.
        too_long: Samples left out.
        longest_turn: Labels of the longest turn of the samples placed.
        steps: What each step trains.
        balance: How even ranks are; None with one data-parallel rank, or where the global batch
            cannot be split.
    """

    plan: RowPlan
    run: Run
    lengths: Counts
    samples_per_row: Counts
    row_costs: Ratios
    padding: Padding
    too_long: TooLong
    longest_turn: int
    steps: Steps
    balance: Balance | None

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows, padding counted."""
        return len(self.plan) * self.plan.row_tokens

    @property
    def iterations(self) -> float:
        """Iterations of an epoch."""
        return self.plan.epoch_rows / self.run.shape.global_batch_size

    @property
    def dearest_over_mean(self) -> float:
        """Cost of the dearest row over that of the mean row."""
        return float(self.row_costs.max() / self.row_costs.mean())

    def as_json(self) -> dict[str, Any]:
        """Return the numbers, those of an epoch where several packings make the plan."""
        plan, packings, total = self.plan, self.plan.num_packings, self.total_tokens
        return {
            "identity": plan.identity,
            "row_tokens": plan.row_tokens,
            "align_tokens": plan.align_tokens,
            "packings": packings,
            "epoch": {
                "rows": plan.epoch_rows,
                "iterations": self.iterations,
                "samples": len(self.lengths) // packings,
                "turns": int(plan.turns.sum()) // packings,
                "tokens": int(plan.tokens.sum()) // packings,
                "label_tokens": int(plan.labels.sum()) // packings,
            },
            "stages": list(plan.stages),
            "padding": sum(self.padding) / total,
            "alignment_padding": self.padding.alignment / total,
            "gaps": self.padding.gaps / total,
            "samples_per_row": Spread.of(self.samples_per_row)._asdict(),
            "rows_of_one_sample": int((self.samples_per_row == 1).sum()),
            "rows_without_labels": int((plan.labels == 0).sum()),
            "too_long": self.too_long._asdict(),
            "steps": {
                name: Spread.of(values)._asdict() for name, values in self.steps._asdict().items()
            },
            "dearest_row_over_mean": self.dearest_over_mean,
            "slowest_rank_over_mean": _balance_json(self.balance),
        }


def forecast(store: TokenStore, plan: RowPlan, run: Run, cost: Cost) -> Forecast:
    """Compute what a run on these rows will see.

    Args:
        store: The samples the plan is of.
        plan: The rows.
        run: On which ranks and in which batches they are trained.
        cost: What a document costs the model.
    """
    all_lengths = store.tokens.lengths.astype(np.int64)
    lengths = all_lengths[plan.rows.samples]
    padded = -(-lengths // plan.align_tokens) * plan.align_tokens
    alignment = int(padded.sum() - lengths.sum())
    gaps = len(plan) * plan.row_tokens - int(padded.sum())
    row_costs = cost.of(plan.row_tokens, plan.squares)
    left_out = all_lengths[plan.too_long]
    return Forecast(
        plan,
        run,
        lengths=lengths,
        samples_per_row=np.diff(plan.rows.borders),
        row_costs=row_costs,
        padding=Padding(alignment, gaps),
        too_long=TooLong(
            len(left_out),
            tokens=int(left_out.sum()),
            longest=int(left_out.max(initial=0)),
            first=int(plan.too_long[0]) if len(left_out) else -1,
        ),
        longest_turn=_longest_turn(store, plan),
        steps=_steps(plan, run),
        balance=balance_of(plan, run, row_costs),
    )


def balance_of(plan: RowPlan, run: Run, row_costs: Ratios) -> Balance | None:
    """Predict how even data-parallel ranks are over the first global batches of a run.

    Args:
        plan: The rows.
        run: On which ranks and in which batches they are trained.
        row_costs: float64 [R]. Cost of each row of the plan.

    Returns:
        None with one data-parallel rank, or where the global batch cannot be split.
    """
    size, dp_size, micro_batch_size = run.shape
    if dp_size == 1 or size % run.pass_rows:
        return None
    order = plan.order(seed=run.seed, window=run.window)
    num_batches = min(BATCHES_LOOKED_AT, -(-len(plan) // size))

    def slowest(order: RowAtPosition) -> Ratios:
        costs = row_costs[_rows_of_steps(order, num_batches, size)]
        return np.array(
            [
                slowest_over_mean(batch, dp_size=dp_size, micro_batch_size=micro_batch_size)
                for batch in costs
            ]
        )

    return Balance(slowest(order), slowest(DealtOrder(order, row_costs, run.shape)))


class PackerFigures(NamedTuple):
    """How one packer does on the samples of a run.

    Attributes:
        num_rows: Rows of an epoch.
        padding: Share of all tokens that is padding.
        samples_per_row: Samples of a row.
        dearest_over_mean: Cost of the dearest row over that of the mean row.
        balance: How even data-parallel ranks are, as in a ``Forecast``.
        epoch_cost: Operations of an epoch, those counted in which ranks wait for the slowest.
    """

    num_rows: float
    padding: float
    samples_per_row: Spread
    dearest_over_mean: float
    balance: Balance | None
    epoch_cost: float

    def as_json(self) -> dict[str, Any]:
        """Return the numbers."""
        spread = self.samples_per_row._asdict()
        balance = _balance_json(self.balance)
        return self._asdict() | {"samples_per_row": spread, "balance": balance}


def figures_of(plan: RowPlan, run: Run, cost: Cost) -> PackerFigures:
    """Measure a plan for comparing it with those of other packers."""
    row_costs = cost.of(plan.row_tokens, plan.squares)
    balance = balance_of(plan, run, row_costs)
    slowest = 1.0 if balance is None else float(balance.after.mean())
    return PackerFigures(
        plan.epoch_rows,
        padding=1 - int(plan.tokens.sum()) / (len(plan) * plan.row_tokens),
        samples_per_row=Spread.of(np.diff(plan.rows.borders)),
        dearest_over_mean=float(row_costs.max() / row_costs.mean()),
        balance=balance,
        epoch_cost=slowest * float(row_costs.sum()) / plan.num_packings,
    )


def _balance_json(balance: Balance | None) -> Mapping[str, float] | None:
    if balance is None:
        return None
    before, after = (float(ratios.mean()) for ratios in balance)
    return {"before": before, "after": after, "global_batches": len(balance.after)}


def _rows_of_steps(order: RowAtPosition, num_steps: int, size: int) -> Counts:
    rows = [order[k] for k in range(num_steps * size)]
    return np.array(rows, np.int64).reshape(num_steps, size)


def _steps(plan: RowPlan, run: Run) -> Steps:
    size = run.shape.global_batch_size
    order = plan.order(seed=run.seed, window=run.window)
    rows = _rows_of_steps(order, -(-len(plan) // size), size)
    per_row = (plan.turns, plan.tokens, plan.labels)
    return Steps(*(values[rows].sum(axis=1) for values in per_row))


def _longest_turn(store: TokenStore, plan: RowPlan) -> int:
    width = len(TURN_FIELDS)
    labels = store.turns.values.reshape(-1, width)[:, TURN_FIELDS.index("num_tokens")]
    is_placed = np.zeros(len(store), bool)
    is_placed[plan.rows.samples] = True
    of_placed = labels[np.repeat(is_placed, np.diff(store.turns.offsets) // width)]
    return int(of_placed.max(initial=0))
