"""What the forward step makes of one share: its part of the step's totals, and of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import default_collate

from megasft import metrics
from megasft.megatron.global_batch import GlobalBatches
from megasft.training import datasets, saving
from megasft.training.report import Report
from tests.one_rank import one_rank, validated
from tests.stores import random_samples, write_store

ROWS = 8


class Model:
    """Stands for Megatron's, on the last stage: every token loses 2."""

    training, vp_stage = True, None

    def __call__(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full(input_ids.shape, 2.0)


class Shares(NamedTuple):
    """What one rank did in a step.

    Attributes:
        reported: Of each of its micro-batches, by name.
        is_added: Whether the table of the report holds anything of them.
    """

    reported: list[dict[str, torch.Tensor]]
    is_added: bool


def train_step(args: Any, rank: int) -> Shares:
    """Run a step's micro-batches of one rank, read as Megatron's sampler reads them."""
    from megasft.megatron.forward_step import forward_step_func

    data = datasets.open_data(args)
    with one_rank(args, rank):
        from megatron.core import mpu

        batches = GlobalBatches(data.train.plan, seed=args.seed, objective=args.megasft_loss)
        report = Report(args, data, batches, saving.Keeper(args, rank=rank))
        step = forward_step_func(args, batches, report)
        rows, _, _ = datasets.datasets_provider(args, data)(None)
        dp_size, dp_rank = args.data_parallel_size, mpu.get_data_parallel_rank()
        reported = []
        for position in range(dp_rank, ROWS, dp_size):
            fields = default_collate(rows.__getitems__([position]))
            losses, loss_func = step(iter([fields]), Model())
            reported.append(loss_func(losses).reported)
        return Shares(reported, bool(report._table("train").sums.any()))


@pytest.fixture
def flags(tmp_path: Path) -> Sequence[str]:
    write_store(tmp_path / "store", random_samples(150, seed=1))
    data = ("--megasft-data", str(tmp_path / "store"), "--calculate-per-token-loss")
    return (*data, "--global-batch-size", str(ROWS), "--train-iters", "1", "--lr", "1e-3")


def test_the_totals_of_a_step_are_those_of_all_its_shares(flags: Sequence[str]) -> None:
    """Megatron sums them over micro-batches, data- and context-parallel ranks, and divides once."""
    layout = ("--context-parallel-size", "2", "--micro-batch-size", "1")
    args = validated(*flags, *layout, world_size=4)
    assert args.data_parallel_size == 2

    reported = [each for rank in range(4) for each in train_step(args, rank).reported]

    plan = datasets.open_data(args).train.plan
    rows = [plan.order(seed=args.seed)[k] for k in range(ROWS)]
    totals = {
        metrics.TURNS: plan.turns,
        metrics.SAMPLES: plan.labelled_samples,
        metrics.TOKENS: plan.labels,
    }
    assert len(reported) == 2 * ROWS, "each row is cut in two"
    for name, of_row in totals.items():
        total, one = sum(each[name] for each in reported).tolist()
        assert total / one == pytest.approx(int(of_row[rows].sum())), name


def test_one_rank_of_a_tensor_parallel_group_adds_the_losses_all_of_them_have(
    flags: Sequence[str],
) -> None:
    args = validated(*flags, "--tensor-model-parallel-size", "2", world_size=2)
    first, second = (train_step(args, rank) for rank in range(2))
    assert len(first.reported) == len(second.reported) == ROWS
    assert (first.is_added, second.is_added) == (True, False)
