"""The factors of side losses; that gradients come out right with them is tested with ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.plan import plan_rows
from tests.one_rank import one_rank, validated
from tests.stores import random_samples, write_store

Scale = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(("grad_scale_func", "fp16"), [(None, 1.0), (lambda one: 8.0 * one, 8.0)])
def test_side_losses_are_scaled_by_what_each_of_them_counts(
    tmp_path: Path, grad_scale_func: Scale | None, fp16: float
) -> None:
    """Megatron multiplies a router's loss by positions, an MTP loss by labels, and trusts that
    units divide both; fp16's loss scale is the hook's business, too."""
    store = write_store(tmp_path / "store", random_samples(150, seed=1))
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1)
    args = validated("--global-batch-size", "8")
    batches = GlobalBatches(plan, seed=args.seed, objective="turn")
    rows = [plan.order(seed=args.seed)[k] for k in range(8, 16)]
    units, labels = int(plan.turns[rows].sum()), int(plan.labels[rows].sum())
    assert len({units, labels, 8 * 64}) == 3
    args.consumed_train_samples = 8
    config: Any = SimpleNamespace(grad_scale_func=grad_scale_func)

    from megasft.megatron import hooks

    hooks.install(config, args, batches, None)

    with one_rank(args):
        assert config.moe_grad_scale_func().item() == pytest.approx(fp16 * units / (8 * 64))
        assert config.mtp_grad_scale_func().item() == pytest.approx(fp16 * units / labels)
