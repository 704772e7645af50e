import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasft.draw import Draw, Stage
from megasft.errors import PlanError
from megasft.packing.pack import PACKERS
from megasft.packing.plan import plan_rows
from tests.stores import random_samples, sample, write_store


def test_a_plan_knows_what_each_row_holds(tmp_path: Path) -> None:
    samples = random_samples(50, seed=1)
    store = write_store(tmp_path / "store", samples)

    plan = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)

    for r in range(len(plan)):
        inside = [samples[i] for i in plan.rows[r]]
        assert plan.turns[r] == sum(len(s.turns) for s in inside)
        assert plan.labels[r] == sum(int(s.turns[:, 1].sum()) for s in inside)
        assert plan.tokens[r] == sum(len(s.tokens) for s in inside)
        documents = [-(-len(s.tokens) // 4) * 4 for s in inside]
        assert plan.squares[r] == sum(d * d for d in [*documents, 64 - sum(documents)])
    assert plan.turns.sum() == sum(len(s.turns) for s in samples)


def test_samples_longer_than_a_row_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [sample([1] * n, (1, 1)) for n in (4, 9, 7, 8, 20)])

    plan = plan_rows(store, row_tokens=8, align_tokens=1, seed=0)

    assert plan.too_long.tolist() == [1, 4]
    assert sorted(plan.rows.samples.tolist()) == [0, 2, 3]


def test_a_cached_plan_is_read_back_only_for_what_it_was_made_for(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(50, seed=1))
    made = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)
    (cached,) = (tmp_path / "store" / "row_plans").glob("*.npz")
    poisoned = made.rows.samples[::-1].copy()
    np.savez(cached, samples=poisoned, borders=made.rows.borders)

    same = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)
    others = [
        plan_rows(store, row_tokens=128, align_tokens=4, seed=0),
        plan_rows(store, row_tokens=64, align_tokens=8, seed=0),
        plan_rows(store, row_tokens=64, align_tokens=4, seed=1),
        plan_rows(
            write_store(tmp_path / "store", random_samples(50, seed=2)),
            row_tokens=64,
            align_tokens=4,
            seed=0,
        ),
    ]

    assert same.rows.samples.tolist() == poisoned.tolist()  # it was read, not made again
    assert all(o.rows.samples.tolist() != poisoned.tolist() for o in others)
    assert len({o.identity for o in [made, *others]}) == 5


def test_a_plan_cut_short_is_made_again(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(50, seed=1))
    made = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)
    (cached,) = (tmp_path / "store" / "row_plans").glob("*.npz")
    cached.write_bytes(cached.read_bytes()[:100])

    again = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)

    assert again.rows.samples.tolist() == made.rows.samples.tolist()


def test_a_store_that_cannot_be_written_to_still_gives_a_plan(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(5, seed=1))
    (tmp_path / "file").write_text("not a folder")

    plan = plan_rows(store, row_tokens=64, align_tokens=1, seed=0, cache=tmp_path / "file")

    assert len(plan.rows.samples) == 5
    (warning,) = plan.warnings
    assert re.fullmatch(r"row plan not cached \(.*file.*\); it will be computed again .*", warning)
    assert plan_rows(store, row_tokens=64, align_tokens=1, seed=0).warnings == ()


def test_sizes_that_make_no_rows_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [sample([1] * 20, (1, 1))])

    with pytest.raises(PlanError, match="set --seq-length to 8 or 12"):
        plan_rows(store, row_tokens=10, align_tokens=4, seed=0)
    with pytest.raises(PlanError, match="the shortest has 20"):
        plan_rows(store, row_tokens=8, align_tokens=1, seed=0)


def test_each_packer_makes_its_own_plan(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(800, seed=1))
    made = {
        packer: plan_rows(store, row_tokens=512, align_tokens=4, seed=0, packer=packer)
        for packer in PACKERS
    }

    assert len({plan.identity for plan in made.values()}) == len(PACKERS)
    assert all(f", {packer}, " in plan.identity for packer, plan in made.items())
    num_rows = {packer: len(plan) for packer, plan in made.items()}
    assert num_rows["best_fit"] <= num_rows["balanced"] < num_rows["sequential"]
    assert num_rows["sequential"] < num_rows["none"] == 800
    spread = {packer: np.ptp(np.diff(plan.rows.borders)) for packer, plan in made.items()}
    assert spread["balanced"] < spread["best_fit"] / 2


def draw_of(*stages: list[int]) -> Draw:
    named = tuple(Stage(str(i), np.array(s, np.int64)) for i, s in enumerate(stages))
    return Draw("sequential", named, (), ())


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=40), min_size=1, max_size=3))
def test_rows_hold_what_was_drawn_stage_by_stage(tmp_path: Path, stages: list[list[int]]) -> None:
    """A sample drawn twice is there twice; counts of rows count it twice."""
    samples = random_samples(30, seed=1)
    store = write_store(tmp_path / "store", samples)

    plan = plan_rows(store, row_tokens=64, align_tokens=4, seed=0, draw=draw_of(*stages))

    assert len(plan.stages) == len(stages) + 1
    for stage, (start, end) in zip(stages, pairwise(plan.stages), strict=True):
        inside = [int(i) for r in range(start, end) for i in plan.rows[r]]
        assert sorted(inside) == sorted(stage)
    for r in range(len(plan)):
        row = [samples[i] for i in plan.rows[r]]
        assert sum(-(-len(s.tokens) // 4) * 4 for s in row) <= 64
        assert plan.turns[r] == sum(len(s.turns) for s in row)
        assert plan.tokens[r] == sum(len(s.tokens) for s in row)


def test_a_plan_of_a_draw_is_cached_for_that_draw_alone(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(30, seed=1))
    draws = [None, draw_of([*range(30)]), draw_of([*range(20)], [*range(20, 30)]), draw_of([7, 7])]
    made = [plan_rows(store, row_tokens=64, align_tokens=4, seed=0, draw=d) for d in draws]

    assert len(list((tmp_path / "store" / "row_plans").glob("*.npz"))) == 4
    assert len({plan.identity for plan in made}) == 4
    assert made[0].identity.endswith("seed 0")  # checkpoints of before mixtures say that
    again = [plan_rows(store, row_tokens=64, align_tokens=4, seed=0, draw=d) for d in draws]
    for one, other in zip(made, again, strict=True):
        assert one.rows.samples.tolist() == other.rows.samples.tolist()
        assert one.stages == other.stages
    assert made[2].stages[0] == 0 < made[2].stages[1] < made[2].stages[2] == len(made[2])
    order = [made[2].order(seed=4)[k] for k in range(len(made[2]))]
    assert set(order[: made[2].stages[1]]) == set(range(made[2].stages[1]))


def test_drawn_samples_longer_than_a_row_are_left_out_and_named_once(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [sample([1] * n, (1, 1)) for n in (4, 9, 9, 8)])

    plan = plan_rows(store, row_tokens=8, align_tokens=1, seed=0, draw=draw_of([0, 1, 1], [2], [3]))

    assert plan.too_long.tolist() == [1, 2]
    assert plan.stages == (0, 1, 1, 2)  # a stage of which nothing fits has no row
    assert "2 rows of 8 tokens (25.00 % padding) in 3 stages, 1 + 0 + 1," in plan.summary(
        global_batch_size=1
    )
    with pytest.raises(PlanError, match=r"none of the 2 samples .*the shortest has 9"):
        plan_rows(store, row_tokens=8, align_tokens=1, seed=0, draw=draw_of([1, 2]))


def test_several_packings_are_an_epoch_each_of_other_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(300, seed=1))
    plan = plan_rows(store, row_tokens=128, align_tokens=4, seed=0, num_packings=3)
    one = plan_rows(store, row_tokens=128, align_tokens=4, seed=0)

    assert len(plan.stages) == 4
    packings = [
        {tuple(sorted(plan.rows[r].tolist())) for r in range(start, end)}
        for start, end in pairwise(plan.stages)
    ]
    for rows in packings:
        assert sorted(i for row in rows for i in row) == list(range(300))
    assert packings[0] == {tuple(sorted(one.rows[r].tolist())) for r in range(len(one))}
    assert len(packings[0] & packings[1]) < len(one) / 10
    assert len(packings[1] & packings[2]) < len(one) / 10

    assert plan.turns.sum() == 3 * one.turns.sum()
    assert plan.identity == f"{one.identity}, 3 packings"
    said = plan.summary(global_batch_size=1)
    assert f"in 3 packings, one an epoch: 300 samples, {one.turns.sum()} turns" in said
    assert f"an epoch is {len(plan) / 3:.2f} iterations" in said
    order = plan.order(seed=5)
    for start, end in pairwise(plan.stages):
        assert sorted(order[k] for k in range(start, end)) == list(range(start, end))
    again = plan_rows(store, row_tokens=128, align_tokens=4, seed=0, num_packings=3)
    assert again.rows.samples.tolist() == plan.rows.samples.tolist()
    assert len(list((tmp_path / "store" / "row_plans").glob("*.npz"))) == 2


def test_packings_of_a_curriculum_go_through_all_stages_each(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(40, seed=1))
    stages = [[*range(20)], [*range(20, 40)]]
    draw = draw_of(*stages)
    plan = plan_rows(
        store, row_tokens=64, align_tokens=4, seed=0, draw=draw, num_packings=2, packer="best_fit"
    )

    assert len(plan.stages) == 5
    for stage, (start, end) in zip(stages * 2, pairwise(plan.stages), strict=True):
        assert sorted(int(i) for r in range(start, end) for i in plan.rows[r]) == stage
    a, b = plan.stages[1:3]
    assert f"in 2 stages, {a} + {b - a} in 2 packings, one an epoch: 40 samples" in plan.summary(
        global_batch_size=1
    )
