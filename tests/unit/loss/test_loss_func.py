import math

import numpy as np
import pytest
import torch

from megasft import metrics
from megasft.batch.assemble import Columns, assemble
from megasft.batch.context_parallel import shard
from megasft.loss.loss_func import sft_loss
from megasft.loss.objectives import OBJECTIVES
from megasft.loss.reweight import dft_weights
from tests.batches import batch_of
from tests.stores import random_samples, sample


def small_row() -> Columns:
    first = sample([0, 1, 2, 3, 4, 5], (1, 1), (4, 2))  # labels at 0 | 3 4
    second = sample([6, 7, 8], (1, 2))  # labels at 6 7
    return assemble([first, second], row_tokens=10, align_tokens=1, pad_token=0)


LOSSES = [3.0, math.nan, math.nan, 1.0, 2.0, math.nan, 5.0, 7.0, math.nan, math.inf]


@pytest.mark.parametrize(
    ("objective", "loss_sum", "units"),
    [
        ("turn", 3.0 + (1.0 + 2.0) / 2 + (5.0 + 7.0) / 2, 3),
        ("sample", (3.0 + 1.0 + 2.0) / 3 + (5.0 + 7.0) / 2, 2),
        ("token", 3.0 + 1.0 + 2.0 + 5.0 + 7.0, 5),
    ],
)
def test_each_objective_is_its_definition_and_ignores_unlabelled_positions(
    objective: str, loss_sum: float, units: int
) -> None:
    out = sft_loss(torch.tensor([LOSSES]), batch=batch_of(small_row()), objective=objective)

    assert out.loss_sum.item() == pytest.approx(loss_sum)
    assert out.units.item() == units and out.units.dtype == torch.int32
    assert out.reported[metrics.LOSS].tolist() == pytest.approx([loss_sum, units])
    assert out.reported[metrics.TOKEN_LOSS].tolist() == pytest.approx([18.0, 5.0])


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_shares_of_a_row_sum_to_the_row(objective: str) -> None:
    row = assemble(random_samples(5, seed=1, longest=40), row_tokens=256, align_tokens=8,
                   pad_token=0)  # fmt: skip
    losses = torch.from_numpy(np.random.default_rng(0).uniform(0, 9, 256)).float()
    whole = sft_loss(losses, batch=batch_of(row), objective=objective)

    total, units, split = 0.0, 0, 0
    for rank in range(4):
        share = shard(row | {"where": np.arange(256)}, cp_rank=rank, cp_size=4)
        position = shard({**row, "labels": np.arange(256)}, cp_rank=rank, cp_size=4)["labels"]
        out = sft_loss(losses[position], batch=batch_of(share), objective=objective)
        total, units = total + out.loss_sum.item(), units + int(out.units)
        split += int(out.units) > 0

    assert split > 1, "the units must lie on several ranks for this test to say anything"
    assert units == int(whole.units)
    assert total == pytest.approx(whole.loss_sum.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_share_without_labels_is_a_no_op_with_a_finite_gradient(alpha: float) -> None:
    row = assemble([], row_tokens=4, align_tokens=1, pad_token=0)
    losses = torch.tensor([math.nan, math.inf, 1.0, 2.0], requires_grad=True)

    out = sft_loss(losses, batch=batch_of(row), dft_alpha=alpha)
    out.loss_sum.backward()

    assert out.loss_sum.item() == 0.0 and int(out.units) == 0
    assert losses.grad is not None and losses.grad.tolist() == [0.0] * 4


def test_gradients_are_the_weights_and_finite_beside_nan() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)

    sft_loss(losses, batch=batch_of(small_row())).loss_sum.backward()

    assert losses.grad is not None
    assert losses.grad.tolist() == [1.0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0, 0]


def test_dft_weighs_a_label_by_its_own_probability_without_a_gradient_through_it() -> None:
    ce = torch.tensor([0.0, math.log(2), math.log(4)], requires_grad=True)

    assert dft_weights(ce, alpha=1.0).tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert dft_weights(ce, alpha=0.5).tolist() == pytest.approx([1.0, 0.75, 0.625])
    assert not dft_weights(ce, alpha=1.0).requires_grad


def test_dft_reweights_the_loss_and_leaves_the_token_loss_plain() -> None:
    row = assemble([sample([0, 1, 2], (1, 2))], row_tokens=3, align_tokens=1, pad_token=0)
    losses = torch.tensor([math.log(2), math.log(4), math.nan])

    out = sft_loss(losses, batch=batch_of(row), objective="token", dft_alpha=1.0)

    assert out.loss_sum.item() == pytest.approx(math.log(2) / 2 + math.log(4) / 4)
    assert out.reported[metrics.TOKEN_LOSS].tolist() == pytest.approx([math.log(8), 2])
    assert out.reported[metrics.P_CORRECT].tolist() == pytest.approx([0.75, 2])


def test_totals_add_up_over_the_parts_of_a_step() -> None:
    outs = [
        sft_loss(torch.tensor(LOSSES), batch=batch_of(small_row()), part=1 / 3) for _ in range(3)
    ]

    for name, expected in ((metrics.TURNS, 9), (metrics.SAMPLES, 6), (metrics.TOKENS, 15)):
        value, one = sum(o.reported[name] for o in outs).tolist()
        assert value / one == pytest.approx(expected)
