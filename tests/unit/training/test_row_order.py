import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megasft.errors import FlagError
from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.balance import LLAMA_8B, BatchShape, DealtOrder
from megasft.packing.order import RowOrder
from megasft.packing.plan import RowPlan, plan_rows
from megasft.training import row_order
from tests.stores import random_samples, write_store


def flags(**changes: Any) -> SimpleNamespace:
    llama = {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "group_query_attention": True,
        "num_query_groups": 8,
        "ffn_hidden_size": 14_336,
        "swiglu": True,
        "num_experts": None,
        "padded_vocab_size": 128_256,
    }
    run = {
        "seed": 9,
        "megasft_no_balance": False,
        "megasft_cost_window": 0,
        "step_batch_size_schedule": None,
        "consumed_train_samples": 0,
        "global_batch_size": 8,
        "data_parallel_size": 2,
        "micro_batch_size": 2,
    }
    return SimpleNamespace(**(llama | run | changes))


@pytest.fixture
def plan(tmp_path: Path) -> RowPlan:
    store = write_store(tmp_path / "store", random_samples(60, seed=3))
    return plan_rows(store, row_tokens=64, align_tokens=8, seed=1, packer="sequential")


def test_the_cost_is_that_of_megatrons_model() -> None:
    assert row_order.cost_of(flags()) == LLAMA_8B
    plain = row_order.cost_of(flags(group_query_attention=False, num_query_groups=1))
    assert plain.per_token - LLAMA_8B.per_token == 6 * 32 * 2 * 4096 * (4096 - 1024)


def test_an_expert_counts_as_often_as_a_token_meets_one() -> None:
    experts = {"num_experts": 64, "moe_router_topk": 6, "moe_ffn_hidden_size": 14_336 // 8}
    shared = {"moe_shared_expert_intermediate_size": 14_336 // 4}
    assert row_order.cost_of(flags(**experts, **shared)) == LLAMA_8B


def test_a_run_resumed_on_another_layout_and_batch_size_trains_what_was_left(
    plan: RowPlan,
) -> None:
    """Two steps of 8 rows, then steps of 12: together the first rows of the plan's order, once."""
    first = row_order.training_order(flags(), plan, BatchShape(8, 2, 2))
    second = row_order.training_order(flags(consumed_train_samples=16), plan, BatchShape(12, 3, 1))
    trained = [first[k] for k in range(16)] + [second[k] for k in range(16, 52)]

    assert isinstance(first, DealtOrder)
    batches = GlobalBatches(plan, seed=9, objective="turn")
    assert sorted(trained[8:16]) == sorted(batches.at(8, num_rows=8).rows)
    assert sorted(trained[28:40]) == sorted(batches.at(28, num_rows=12).rows)
    order = plan.order(seed=9)
    assert 16 < len(plan) < 52, "an epoch ends within the run"
    assert sorted(trained) == sorted(order[k] for k in range(52))
    assert trained != [order[k] for k in range(52)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"megasft_no_balance": True}, "--megasft-no-balance is given"),
        ({"step_batch_size_schedule": "0:2 1K:4"}, "--step-batch-size-schedule moves the edges"),
    ],
)
def test_rows_are_not_dealt_where_global_batches_are_not_known_and_the_log_says_why(
    plan: RowPlan, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    order = row_order.training_order(flags(**changes), plan, BatchShape(8, 2, 2))
    assert isinstance(order, RowOrder)
    with caplog.at_level(logging.INFO, "megasft"):
        row_order.announce(flags(**changes), plan)
    assert reason in caplog.messages[0]


def test_the_gain_is_predicted_before_the_run(
    plan: RowPlan, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"hidden_size": 8, "ffn_hidden_size": 8, "padded_vocab_size": 8}
    with caplog.at_level(logging.INFO, "megasft"):
        row_order.announce(flags(**small, micro_batch_size=1), plan)

    (line,) = caplog.messages
    found = [float(word) for word in line.split() if word.startswith("1.")]
    assert line.startswith("balance: the slowest of 2 data-parallel ranks takes 1.")
    assert 1 <= found[0] < found[1]
    assert len(np.unique(plan.squares)) > 5, "rows must differ for a deal to matter"


def test_a_cost_window_changes_the_batches_and_both_sides_of_the_audit_know(
    plan: RowPlan, caplog: pytest.LogCaptureFixture
) -> None:
    window = row_order.cost_window(flags(megasft_cost_window=3))
    assert window is not None
    order = row_order.training_order(flags(megasft_cost_window=3), plan, BatchShape(8, 2, 1))
    batches = GlobalBatches(plan, seed=9, objective="turn", window=window)
    plain = GlobalBatches(plan, seed=9, objective="turn")
    starts = range(0, 48, 8)
    for first in starts:
        assert sorted(order[k] for k in range(first, first + 8)) == sorted(
            batches.at(first, num_rows=8).rows
        )
    moved = [
        set(batches.at(k, num_rows=8).rows) != set(plain.at(k, num_rows=8).rows) for k in starts
    ]
    assert any(moved)

    assert row_order.identity(plan, None) == plan.identity
    assert row_order.identity(plan, window) == f"{plan.identity}, cost window 3 batches of 8 rows"
    with caplog.at_level(logging.INFO, "megasft"):
        row_order.announce(flags(megasft_cost_window=3), plan)
    assert "over 3 global batches of 8, so what makes a batch is no random" in caplog.messages[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_batch_size_schedule": "0:2"}, "and --step-batch-size-schedule moves their edges"),
        ({"global_batch_size": None}, "needs --global-batch-size N"),
    ],
)
def test_a_cost_window_without_batches_of_one_size_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        row_order.cost_window(flags(megasft_cost_window=2, **changes))
