from pathlib import Path

import numpy as np
import pytest

from megasft.draw import Draw, Stage
from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.locate import (
    first_step_of_row,
    row_of_sample,
    rows_of_sample,
    rows_of_step,
)
from megasft.packing.plan import RowPlan, plan_rows
from tests.stores import random_samples, sample, write_store


@pytest.fixture
def plan(tmp_path: Path) -> RowPlan:
    store = write_store(tmp_path / "store", random_samples(50, seed=1))
    return plan_rows(store, row_tokens=64, align_tokens=4, seed=7)


def test_the_row_of_each_sample_is_the_one_that_lists_it(plan: RowPlan) -> None:
    assert len(plan) > 10
    for row in range(len(plan)):
        assert {row_of_sample(plan, int(s)) for s in plan.rows[row]} == {row}


def test_a_sample_longer_than_a_row_has_none(tmp_path: Path) -> None:
    store = write_store(tmp_path / "long", [sample([1] * n, (1, 1)) for n in (4, 9)])
    plan = plan_rows(store, row_tokens=8, align_tokens=1, seed=0)
    assert row_of_sample(plan, 0) == 0
    assert row_of_sample(plan, 1) is None


def test_the_rows_of_a_step_are_those_the_audit_expects_there(plan: RowPlan) -> None:
    size = 7
    assert len(plan) % size  # a step straddles the edge of an epoch
    audited = GlobalBatches(plan, seed=7, objective="turn")
    for step in range(1, 12):
        rows = rows_of_step(plan, step=step, global_batch_size=size, seed=7)
        assert tuple(rows) == audited.at((step - 1) * size, num_rows=size).rows
    seven = rows_of_step(plan, step=1, global_batch_size=size, seed=7)
    assert seven != rows_of_step(plan, step=1, global_batch_size=size, seed=8)


def test_the_first_step_of_a_row_trains_it(plan: RowPlan) -> None:
    for row in range(len(plan)):
        step = first_step_of_row(plan, row, global_batch_size=4, seed=7)
        assert row in rows_of_step(plan, step=step, global_batch_size=4, seed=7)
        assert (step - 1) * 4 < len(plan)  # in the first epoch


def test_each_copy_of_a_sample_is_found_and_stages_have_their_steps(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [sample([1] * 6, (1, 1)) for _ in range(6)])
    stages = (Stage("a", np.array([0, 1, 2])), Stage("b", np.array([3, 0, 4])))
    plan = plan_rows(
        store, row_tokens=8, align_tokens=1, seed=0, draw=Draw("sequential", stages, (), ())
    )
    rows = rows_of_sample(plan, 0)
    assert len(rows) == 2
    assert rows[0] < 3 <= rows[1]
    assert row_of_sample(plan, 0) == rows[0]
    assert rows_of_sample(plan, 5) == []
    assert set(rows_of_step(plan, step=1, global_batch_size=3, seed=1)) == {0, 1, 2}
    assert set(rows_of_step(plan, step=2, global_batch_size=3, seed=1)) == {3, 4, 5}
    assert first_step_of_row(plan, rows[1], global_batch_size=3, seed=1) == 2
