import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasft.draw import Draw, Stage
from megasft.packing.balance import LLAMA_8B, BatchShape, Cost
from megasft.packing.cost_window import CostWindow
from megasft.packing.forecast import Forecast, Run, Spread, figures_of, forecast
from megasft.packing.locate import rows_of_step
from megasft.packing.pack import PACKERS
from megasft.packing.plan import RowPlan, plan_rows
from megasft.schema import Sample
from megasft.store import TokenStore
from megasft.training import row_order
from tests.stores import random_samples, sample, write_store

SQUARES_ONLY = Cost(per_token=0, per_square=1)
SAMPLES = [*random_samples(60, seed=3), sample([1] * 99, (1, 98)), sample([1] * 70, (1, 9))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("forecast") / "store", SAMPLES)


def run_of(size: int, *, dp: int = 1, micro: int = 1, **changes: Any) -> Run:
    return Run(BatchShape(size, dp, micro), seed=9, **changes)


def planned(store: TokenStore, *, packer: str = "balanced", **changes: Any) -> RowPlan:
    return plan_rows(store, row_tokens=64, seed=9, packer=packer, **{"align_tokens": 8} | changes)


def cost_by_eye(row: list[Sample], align_tokens: int) -> int:
    documents = [-(-len(one.tokens) // align_tokens) * align_tokens for one in row]
    return sum(n * n for n in [*documents, 64 - sum(documents)])


def seen_by(store: TokenStore, run: Run, **changes: Any) -> Forecast:
    return forecast(store, planned(store, **changes), run, SQUARES_ONLY)


def test_a_small_run_counted_by_eye(tmp_path: Path) -> None:
    """Samples of 5 and 3 share a row of 8; one of 6 has its own; 9 and 20 fit none."""
    sizes = (5, 6, 9, 3, 20)
    samples = [sample([1] * n, (1, n - 1)) for n in sizes]
    store = write_store(tmp_path / "store", samples)
    plan = plan_rows(store, row_tokens=8, align_tokens=1, seed=0, packer="best_fit")

    seen = forecast(store, plan, run_of(1), LLAMA_8B)

    assert sorted(seen.samples_per_row.tolist()) == [1, 2]
    assert seen.padding == (0, 2)
    assert seen.too_long == (2, 29, 20, 2)
    assert seen.longest_turn == 5
    assert sorted(seen.steps.labels.tolist()) == [5, 6]
    assert (seen.iterations, seen.balance) == (2.0, None)
    wide = plan_rows(store, row_tokens=8, align_tokens=4, seed=0, packer="best_fit")
    padded = forecast(store, wide, run_of(1), LLAMA_8B)
    assert padded.padding == (3 + 2 + 1, 4)
    found = padded.as_json()
    parts = [found[name] for name in ("padding", "alignment_padding", "gaps")]
    assert parts == [10 / 24, 6 / 24, 4 / 24]


def test_the_json_of_a_small_run_counted_by_eye(tmp_path: Path) -> None:
    """Samples of 5 and 3 share a row; 9 and 20 fit none; one has no labels."""
    samples = [*(sample([1] * n, (1, n - 1)) for n in (5, 6, 9, 3, 20)), sample([1] * 8)]
    store = write_store(tmp_path / "store", samples)
    plan = plan_rows(store, row_tokens=8, align_tokens=1, seed=0, packer="best_fit")

    found = forecast(store, plan, run_of(1), LLAMA_8B).as_json()

    assert found.pop("identity") == plan.identity
    assert found.pop("dearest_row_over_mean") == pytest.approx(1.0, rel=1e-3)
    counts = {"rows": 3.0, "iterations": 3.0, "samples": 4, "turns": 3}
    steps = {"turns": Spread(0, 1, 2), "tokens": Spread(6, 22 / 3, 8)}
    steps |= {"labels": Spread(0, 11 / 3, 6)}
    plan_facts = {"row_tokens": 8, "align_tokens": 1, "packings": 1, "stages": [0, 3]}
    padding = {"padding": 2 / 24, "alignment_padding": 0.0, "gaps": 2 / 24}
    assert found == plan_facts | padding | {
        "epoch": counts | {"tokens": 22, "label_tokens": 11},
        "steps": {name: spread._asdict() for name, spread in steps.items()},
        "samples_per_row": Spread(1, 4 / 3, 2)._asdict(),
        "rows_of_one_sample": 2,
        "rows_without_labels": 1,
        "too_long": {"num_samples": 2, "tokens": 29, "longest": 20, "first": 2},
        "slowest_rank_over_mean": None,
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packer=st.sampled_from(sorted(PACKERS)),
    align_tokens=st.sampled_from([1, 2, 8, 16]),
    dp=st.integers(1, 3),
    micro=st.integers(1, 2),
    accumulated=st.integers(1, 40),
    window=st.sampled_from([0, 2, 5]),
)
def test_steps_padding_and_ranks_are_those_of_the_rows_trained(
    store: TokenStore,
    packer: str,
    align_tokens: int,
    dp: int,
    micro: int,
    accumulated: int,
    window: int,
) -> None:
    """Against loops over samples, for any batch, larger than the epoch too."""
    size = dp * micro * accumulated
    order = CostWindow(window, size) if window else None
    run = run_of(size, dp=dp, micro=micro, window=order)
    seen = seen_by(store, run, packer=packer, align_tokens=align_tokens)
    plan = seen.plan

    def trained(step: int) -> list[list[Sample]]:
        rows = rows_of_step(plan, step=step, global_batch_size=size, seed=9, window=order)
        return [[SAMPLES[i] for i in plan.rows[row]] for row in rows]

    assert len(seen.steps.turns) == -(-len(plan) // size)
    for step in range(1, len(seen.steps.turns) + 1):
        inside = [one for row in trained(step) for one in row]
        assert seen.steps.turns[step - 1] == sum(len(one.turns) for one in inside)
        assert seen.steps.tokens[step - 1] == sum(len(one.tokens) for one in inside)
        assert seen.steps.labels[step - 1] == sum(int(one.turns[:, 1].sum()) for one in inside)
    true_tokens = int(plan.tokens.sum())
    assert sum(seen.padding) + true_tokens == len(plan) * 64
    sizes = [len(SAMPLES[i].tokens) for i in plan.rows.samples]
    assert seen.padding.alignment == sum(-n % align_tokens for n in sizes)
    assert (seen.balance is None) == (dp == 1)
    if seen.balance is not None:
        before, after = seen.balance
        assert len(before) == len(after) == min(50, len(seen.steps.turns))
        assert (after >= 1).all()
        # A step in the order of the plan: micro-batch by micro-batch, rank by rank.
        costs = [cost_by_eye(row, align_tokens) for row in trained(1)]
        of_rank = [
            sum(c for k, c in enumerate(costs) if k // micro % dp == rank) for rank in range(dp)
        ]
        assert before[0] == pytest.approx(max(of_rank) / np.mean(of_rank))


@pytest.mark.parametrize("changes", [{}, {"megasft_cost_window": 3}, {"micro_batch_size": 1}])
def test_ranks_are_as_even_as_the_run_will_log(
    store: TokenStore, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    args = {"seed": 9, "megasft_no_balance": False, "megasft_cost_window": 0}
    args |= dict.fromkeys(
        ("rampup_batch_size", "step_batch_size_schedule", "phase_transition_iterations")
    )
    args |= {"global_batch_size": 8, "data_parallel_size": 2, "micro_batch_size": 2}
    tiny = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "kv_channels": 4}
    tiny |= {"group_query_attention": False, "num_query_groups": None, "num_experts": None}
    tiny |= {"ffn_hidden_size": 8, "swiglu": True, "padded_vocab_size": 8}
    flags = SimpleNamespace(**(args | tiny | changes))
    window = row_order.cost_window(flags)
    plan = planned(store)
    run = run_of(8, dp=2, micro=flags.micro_batch_size, window=window)

    with caplog.at_level(logging.INFO, "megasft"):
        row_order.announce(flags, plan)
    seen = forecast(store, plan, run, row_order.cost_of(flags))

    assert seen.balance is not None
    before, after = (ratios.mean() for ratios in seen.balance)
    assert before > after > 1
    line = f"takes {after:.3f} times the mean of them, and {before:.3f} times without the deal"
    assert line in caplog.messages[-1]
    assert f"({len(seen.balance.after)} global batches)" in caplog.messages[-1]


def test_several_packings_are_counted_by_the_epoch(store: TokenStore) -> None:
    once, thrice = (seen_by(store, run_of(4), num_packings=n).as_json() for n in (1, 3))
    per_epoch = {"samples", "turns", "tokens", "label_tokens"}
    assert {k: once["epoch"][k] for k in per_epoch} == {k: thrice["epoch"][k] for k in per_epoch}
    assert thrice["packings"] == 3
    assert thrice["epoch"]["rows"] == pytest.approx(once["epoch"]["rows"], abs=1)


def test_a_sample_drawn_twice_counts_twice_and_the_longest_turn_is_one_that_is_drawn(
    store: TokenStore,
) -> None:
    drawn = Draw("mixed", (Stage("mixed", np.array([0, 1, 1])),), (), ())
    seen = seen_by(store, run_of(1), draw=drawn)
    assert sorted(seen.lengths.tolist()) == sorted(len(SAMPLES[i].tokens) for i in (0, 1, 1))
    assert seen.longest_turn == max(int(SAMPLES[i].turns[:, 1].max()) for i in (0, 1))
    assert seen_by(store, run_of(1)).longest_turn > seen.longest_turn


def test_a_batch_that_ranks_do_not_divide_has_no_balance(store: TokenStore) -> None:
    assert seen_by(store, run_of(9, dp=2)).balance is None
    assert run_of(9, dp=2, micro=3).num_micro_batches == 1.5


def test_packers_are_compared_by_the_time_of_an_epoch(store: TokenStore) -> None:
    run, cost = run_of(8, dp=2), Cost(per_token=100, per_square=1)
    by_name = {name: figures_of(planned(store, packer=name), run, cost) for name in PACKERS}
    one = by_name["none"]
    assert one.num_rows == 60
    assert one.samples_per_row == Spread(1, 1, 1)
    assert one.epoch_cost > 1.5 * by_name["balanced"].epoch_cost
    assert one.padding > by_name["sequential"].padding >= by_name["balanced"].padding
    seen = forecast(store, planned(store), run, cost)
    assert by_name["balanced"].padding == pytest.approx(sum(seen.padding) / seen.total_tokens)
    assert by_name["balanced"].dearest_over_mean == seen.dearest_over_mean
    assert seen.dearest_over_mean == seen.row_costs.max() / seen.row_costs.mean() > 1
    assert seen.balance is not None and seen.balance.before.mean() > seen.balance.after.mean() > 1
    wanted = seen.balance.after.mean() * seen.row_costs.sum()
    assert by_name["balanced"].epoch_cost == pytest.approx(wanted)
    ratios = seen.as_json()["slowest_rank_over_mean"]
    assert ratios["before"] == pytest.approx(seen.balance.before.mean())
    assert ratios["after"] == pytest.approx(seen.balance.after.mean())
    several, tokens_alone = planned(store, num_packings=3), Cost(per_token=1, per_square=0)
    one_epoch = figures_of(several, run_of(8), tokens_alone)
    assert one_epoch.epoch_cost == pytest.approx(64 * several.epoch_rows)
