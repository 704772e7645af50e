import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megasft.cli.planned import RowFlags, plan_as_trained, plans_by_packer
from megasft.packing.cost_window import CostWindow
from megasft.packing.locate import rows_of_step
from megasft.packing.pack import PACKERS
from megasft.packing.plan import plan_rows
from megasft.store import META, TokenStore, open_store
from tests.stores import random_samples, write_store

from .conftest import Seen


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    made = write_store(tmp_path / "store", random_samples(90, seed=3))
    (made.path / META).write_bytes(orjson.dumps(made.meta | {"categories": {}}))
    return open_store(made.path)


def test_rows_are_those_of_training_with_its_defaults(store: TokenStore) -> None:
    plan = plan_as_trained(store, RowFlags(64)).plan
    trained = plan_rows(store, row_tokens=64, align_tokens=8, seed=1234, packer="balanced")
    assert plan.identity == trained.identity
    assert plan.rows.samples.tolist() == trained.rows.samples.tolist()


def test_each_packer_packs_the_same_samples(store: TokenStore) -> None:
    flags = RowFlags(64, packer="best_fit", packings=2)
    planned = plan_as_trained(store, flags)
    plans = dict(plans_by_packer(store, flags, planned))
    assert list(plans) == list(PACKERS)
    assert plans["best_fit"] is planned.plan
    for name, plan in plans.items():
        times = 2 if name == "best_fit" else 1
        assert sorted(plan.rows.samples.tolist()) == sorted([*range(90)] * times)


def test_a_step_is_traced_with_the_packings_and_the_window_of_the_run(
    store: TokenStore, megasft: Callable[..., Seen]
) -> None:
    flags = RowFlags(64, packings=3)
    plan = plan_as_trained(store, flags).plan
    step = len(plan) // 4
    window = CostWindow(3, 4)
    rows = rows_of_step(plan, step=step, global_batch_size=4, seed=1234, window=window)
    assert min(rows) > plan.epoch_rows + 2, "a row of the first packing tells nothing"

    run = ("--seq-length", 64, "--packings", 3, "--cost-window", 3)
    seen = megasft("trace", store.path, "--step", step, *run, "--global-batch-size", 4).out

    assert [int(row) for row in re.findall(r"^row (\d+)", seen, re.MULTILINE)] == rows
    assert "epoch 3 (an epoch is" in seen
    where = megasft("trace", store.path, "--row", rows[0], *run, "--global-batch-size", 4).out
    assert f"trained first at step {step}; once in 3 epochs of {len(plan)} rows" in where
    refused = megasft("trace", store.path, "--row", 0, *run)
    assert "--cost-window needs --global-batch-size" in refused.err
