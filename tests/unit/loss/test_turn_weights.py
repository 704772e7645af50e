"""Weights of turns in the loss: the definition by hand, and mistakes that must show."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from megasft import metrics
from megasft.batch.assemble import Columns, assemble
from megasft.batch.context_parallel import shard
from megasft.loss.breakdown import COLUMNS, WEIGHTED_CE, Breakdown
from megasft.loss.loss_func import sft_loss
from megasft.loss.objectives import OBJECTIVES
from megasft.proof.samples import weighted
from megasft.report.record import losses_of
from megasft.schema import SFTBatch
from tests.batches import batch_of
from tests.stores import random_samples, sample

LOSSES = [3.0, math.nan, math.nan, 1.0, 2.0, math.nan, 5.0, 7.0, math.nan, math.inf]


def small_row() -> Columns:
    """Labels at 0 | 3 4 of one sample, with weights 0.5 and 4; at 6 7 of another, with weight 2."""
    first = sample([0, 1, 2, 3, 4, 5], (1, 1), (4, 2), weights=[0.5, 4.0])
    second = sample([6, 7, 8], (1, 2), weights=[2.0])
    return assemble([first, second], row_tokens=10, align_tokens=1, pad_token=0)


# Sums of w * ce over labels, turns and samples: 0.5 x 3 = 1.5, 4 x (1 + 2) = 12, 2 x (5 + 7) = 24.
BY_HAND = {
    "turn": (1.5 + 12 / 2 + 24 / 2, 3, 0.5 + 4.0 + 2.0),
    "sample": ((1.5 + 12) / 3 + 24 / 2, 2, (0.5 + 2 * 4.0) / 3 + 2.0),
    "token": (1.5 + 12 + 24, 5, 0.5 + 2 * 4.0 + 2 * 2.0),
}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_each_objective_weighs_turns_by_its_definition(objective: str) -> None:
    loss_sum, units, weight_sum = BY_HAND[objective]
    row = batch_of(small_row())

    used = sft_loss(torch.tensor(LOSSES), batch=row, objective=objective)
    scale = units / weight_sum
    even = sft_loss(torch.tensor(LOSSES), batch=row, objective=objective, weight_scale=scale)

    assert used.loss_sum.item() == pytest.approx(loss_sum)
    assert even.loss_sum.item() / units == pytest.approx(loss_sum / weight_sum)
    assert used.units.item() == even.units.item() == units, "weights change no count"
    assert used.reported[metrics.LOSS].tolist() == pytest.approx([loss_sum, units])
    assert used.reported[metrics.TOKEN_LOSS].tolist() == pytest.approx([18.0, 5.0]), "it is plain"


def test_dft_multiplies_the_weighted_loss_once() -> None:
    row = assemble(
        [sample([0, 1, 2], (1, 2), weights=[3.0])], row_tokens=3, align_tokens=1, pad_token=0
    )
    losses = torch.tensor([math.log(2), math.log(4), math.nan], requires_grad=True)

    out = sft_loss(losses, batch=batch_of(row), objective="token", dft_alpha=1.0)
    out.loss_sum.backward()

    assert out.loss_sum.item() == pytest.approx(3 * math.log(2) / 2 + 3 * math.log(4) / 4)
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1.5, 0.75, 0.0]), "3 p, and p has no gradient"


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_weights_of_1_change_no_bit_of_what_a_label_weighs(objective: str) -> None:
    samples = random_samples(12, seed=3)
    row = batch_of(assemble(samples, row_tokens=1024, align_tokens=8, pad_token=0))
    lengths = {"turn": row.turn_tokens, "sample": row.sample_tokens}.get(objective)

    found = OBJECTIVES[objective].weights(row)

    labelled = row.turn_tokens > 0
    plain = labelled.float()
    if lengths is not None:  # as it was before turns had weights
        plain = torch.where(lengths > 0, 1.0 / lengths.clamp(min=1).float(), 0.0)
    assert labelled.any() and torch.equal(found, plain)


Change = Callable[[SFTBatch], SFTBatch]


def as_it_is(batch: SFTBatch) -> SFTBatch:
    return batch


def dropped_behind_a_cut(batch: SFTBatch) -> SFTBatch:
    """A turn's weight is known where the turn begins, and 1 behind the next cut."""
    starts = torch.cat(
        [torch.tensor([0]), 1 + (torch.diff(batch.position_ids) != 1).nonzero()[:, 0]]
    )
    whole = torch.ones_like(batch.turn_weights)
    for start, end in zip(starts.tolist(), [*starts.tolist()[1:], len(whole)], strict=True):
        begins = batch.turn_tokens[start] == 0 or batch.position_ids[start] == 0
        if begins:
            whole[start:end] = batch.turn_weights[start:end]
    return batch._replace(turn_weights=whole)


def weighed_twice(batch: SFTBatch) -> SFTBatch:
    return batch._replace(turn_weights=batch.turn_weights**2)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize(
    ("change", "holds"), [(as_it_is, True), (dropped_behind_a_cut, False), (weighed_twice, False)]
)
def test_shares_of_a_weighted_row_sum_to_the_row(
    objective: str, change: Change, holds: bool
) -> None:
    samples = weighted(random_samples(5, seed=1, longest=40), seed=2)
    row = assemble(samples, row_tokens=256, align_tokens=8, pad_token=0)
    losses = torch.from_numpy(np.random.default_rng(0).uniform(0, 9, 256)).float()
    wanted = sum(
        weight * losses[t].item() / {"turn": turn, "sample": whole, "token": 1}[objective]
        for t, (turn, whole, weight) in enumerate(
            zip(row["turn_tokens"], row["sample_tokens"], row["turn_weights"], strict=True)
        )
        if turn
    )

    total, units = 0.0, []
    for rank in range(4):
        share = change(batch_of(shard(row, cp_rank=rank, cp_size=4)))
        here = shard({**row, "labels": np.arange(256)}, cp_rank=rank, cp_size=4)["labels"]
        out = sft_loss(losses[here], batch=share, objective=objective, dft_alpha=0.0)
        total, units = total + out.loss_sum.item(), [*units, int(out.units)]

    assert sum(n > 0 for n in units) > 1, "units on several ranks, or this says nothing"
    assert (total == pytest.approx(wanted, rel=1e-5)) == holds


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_reported_loss_is_the_optimised_one_and_all_others_are_plain(
    objective: str, alpha: float
) -> None:
    samples = weighted(random_samples(6, seed=4), seed=5)
    row = batch_of(assemble(samples, row_tokens=512, align_tokens=8, pad_token=0))
    losses = torch.from_numpy(np.random.default_rng(0).uniform(0, 3, 512)).float()
    out = sft_loss(losses, batch=row, objective=objective, dft_alpha=alpha, weight_scale=0.75)
    optimised = out.loss_sum.item() / int(out.units)

    def report(batch: SFTBatch, *, has_weights: bool, scale: float) -> dict[str, float]:
        table = Breakdown([{}], objective=objective, has_weights=has_weights)
        table.add(losses, batch)
        (slots,), names = table.sums.tolist(), table.names[0]
        assert len(slots[0]) == len(COLUMNS) + has_weights, WEIGHTED_CE
        found = losses_of(slots, names, objective=objective, dft_alpha=alpha, weight_scale=scale)
        assert found is not None
        means = ("loss", "token_loss", "sample_loss", "turn_loss", "p_correct", "divisor")
        of_all = {name: getattr(found, name) for name in means}
        return of_all | {name: one.loss for name, one in found.turn_positions.items()}

    told = report(row, has_weights=True, scale=0.75)
    plain = row._replace(turn_weights=(row.turn_tokens > 0).float())
    without = report(plain, has_weights=False, scale=1.0)

    assert told.pop("loss") == pytest.approx(optimised, rel=1e-5)
    assert told.pop("divisor") == pytest.approx(int(out.units) / 0.75)
    assert abs(without.pop("loss") - optimised) > 1e-2 and without.pop("divisor") == int(out.units)
    assert told == without
