"""The truth groups rows into the micro-batches that ranks train."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint_convert.config_map import read_model
from megasft.batch.dataset import PackedRows, RowShape
from megasft.packing.balance import BatchShape
from megasft.proof import families
from megasft.proof.float64 import widen
from megasft.proof.samples import random_samples, write_store
from megasft.proof.verdict import GRADIENT_TOLERANCE, worst
from megasft.proof.world import ALIGN, BATCH, OBJECTIVES, ROW_TOKENS, SEED, World, padded_documents
from megasft.training.row_order import training_order


def made(folder: Path, family: str) -> World:
    """A world without a Megatron checkpoint, which takes long to convert."""
    store = write_store(folder / "store", random_samples(120, row_tokens=ROW_TOKENS, seed=SEED))
    hf = families.build(family, seed=0)
    hf.save_pretrained(folder / family / "hf")
    return World(folder, family, store, widen(hf), read_model(folder / family / "hf"))


def training_flags(world: World) -> SimpleNamespace:
    """Megatron's arguments as the conversion writes them, and those of a new run."""
    flags = list(world.model.flags)
    names = [i for i, flag in enumerate(flags) if flag.startswith("--")]
    given: dict[str, Any] = {"num_experts": None, "moe_shared_expert_intermediate_size": None}
    for start, end in zip(names, [*names[1:], len(flags)], strict=True):
        values = [int(v) if v.isdecimal() else v for v in flags[start + 1 : end]]
        given[flags[start][2:].replace("-", "_")] = values[0] if values else True
    run = {"megasft_no_balance": False, "megasft_cost_window": 0, "step_batch_size_schedule": None}
    return SimpleNamespace(**given, **run, seed=SEED, consumed_train_samples=0)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3"])
@pytest.mark.parametrize(("dp_size", "mbs"), [(1, 1), (2, 2), (1, 4), (4, 2), (2, 1)])
def test_the_truth_groups_rows_as_the_dataset_hands_them_to_ranks(
    tmp_path: Path, family: str, dp_size: int, mbs: int
) -> None:
    """Mirrors the positions of ``MegatronPretrainingSampler`` of megatron-core 0.19.2."""
    world = made(tmp_path, family)
    plan = world.plan
    order = training_order(training_flags(world), plan, BatchShape(BATCH, dp_size, mbs))
    shape = RowShape(row_tokens=ROW_TOKENS, align_tokens=ALIGN, pad_token=0)
    rows = PackedRows([(world.store, plan.rows)], order, length=1000, shape=shape)

    trained = []
    for rank in range(dp_size):
        for step in range(BATCH // dp_size // mbs):
            first = (step * dp_size + rank) * mbs
            (batch,) = rows.__getitems__(list(range(first, first + mbs)))
            trained.append(sorted(batch["tokens"].reshape(mbs, ROW_TOKENS).tolist()))

    groups = world.micro_batches(dp_size=dp_size, mbs=mbs)
    known = [
        sorted([list(chain(*padded_documents(row))) for row in world.samples(group)])
        for group in groups
    ]
    assert sorted(known) == sorted(trained)
    where_they_come = plan.order(seed=SEED)
    in_turn = {
        tuple(sorted(where_they_come[i + k] for k in range(mbs))) for i in range(0, BATCH, mbs)
    }
    assert (set(groups) == in_turn) == (mbs == 1), "balancing must show"


@pytest.mark.slow  # two steps of a model of experts, in float64
def test_router_losses_of_other_micro_batches_are_another_truth(tmp_path: Path) -> None:
    """As it was when the truth grouped rows in the order of the plan: off by 2e-2."""
    world = replace(made(tmp_path, "qwen2_moe"), batch=4)
    (a, b), (c, d) = right = world.micro_batches(dp_size=2, mbs=2)

    truth, other = (
        world.truth(OBJECTIVES["router"], groups) for groups in (right, ((a, c), (b, d)))
    )

    assert truth.loss == pytest.approx(other.loss, rel=1e-12)
    assert worst(other.gradients, truth.gradients)[0] > 100 * GRADIENT_TOLERANCE
