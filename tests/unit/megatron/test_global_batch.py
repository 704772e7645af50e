from pathlib import Path

import numpy as np
import pytest

from megasft.draw import Draw, Stage
from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.order import RowOrder
from megasft.packing.plan import RowPlan, plan_rows
from tests.stores import random_samples, sample, write_store


def plan_of(path: Path) -> RowPlan:
    samples = [*random_samples(40, seed=3), sample([1, 2, 3])]
    return plan_rows(write_store(path, samples), row_tokens=64, align_tokens=8, seed=1)


@pytest.mark.parametrize("objective", ["turn", "sample", "token"])
def test_a_global_batch_holds_what_its_rows_samples_hold(tmp_path: Path, objective: str) -> None:
    plan = plan_of(tmp_path / "store")
    samples = [*random_samples(40, seed=3), sample([1, 2, 3])]
    order = RowOrder(num_rows=len(plan), seed=9)
    position, size = len(plan) - 2, 5  # straddles the edge of an epoch

    batch = GlobalBatches(plan, seed=9, objective=objective).at(position, num_rows=size)

    rows = [order[k] for k in range(position, position + size)]
    inside = [samples[i] for r in rows for i in plan.rows[r]]
    labels = sum(int(s.turns[:, 1].sum()) for s in inside)
    units = {
        "turn": sum(len(s.turns) for s in inside),
        "sample": sum(1 for s in inside if len(s.turns)),
        "token": labels,
    }
    assert batch.rows == tuple(rows)
    assert batch.units == units[objective]
    assert (batch.labels, batch.positions) == (labels, size * 64)


def test_an_epoch_counts_every_unit_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "store")

    batch = GlobalBatches(plan, seed=0, objective="sample").at(0, num_rows=len(plan))

    assert batch.units == 40, "the sample without a turn is no unit"


def test_a_global_batch_follows_the_stages_of_the_plan(tmp_path: Path) -> None:
    samples = [sample([1] * 60, *((1 + 2 * i, 1) for i in range(n))) for n in (1, 2, 3, 4)]
    stages = (Stage("hard", np.array([3, 3, 2])), Stage("easy", np.array([0, 1, 0])))
    drawn = Draw("sequential", stages, (), ())
    store = write_store(tmp_path / "store", samples)
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1, draw=drawn)

    batches = GlobalBatches(plan, seed=9, objective="turn")

    in_epochs = [batches.at(3 * step, num_rows=3).units for step in range(4)]
    assert in_epochs == [4 + 4 + 3, 1 + 2 + 1] * 2
