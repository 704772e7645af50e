"""Dealing the rows of a global batch to ranks changes who trains them, and no number."""

import pytest

from tests.megatron.conftest import World
from tests.megatron.runs import scalars, train

pytestmark = pytest.mark.slow

RUNS = ("plain1", "dealt1", "plain2", "dealt2", "windowed1", "windowed2")


def test_dealing_rows_to_ranks_changes_no_loss_wherever_a_run_is_resumed(world: World) -> None:
    """Dealt on 2 ranks, then on 1 with other batches, each against a run that is not dealt.

    The second phase trains 4 rows a step, two a micro-batch, across the end of an epoch. Megatron's
    ``MegatronPretrainingSampler`` (megatron-core 0.19.2) gives positions to ranks; the audit
    compares the units of each step with the plan's. Does not cover a batch size that ramps up,
    where rows are not dealt. A cost window over two packings makes other batches, which are the
    same on both numbers of ranks.
    """
    folder = world.folder / "dealt"
    steady = ("--lr-decay-style", "constant", "--eval-interval", 1000)
    other = ("--load", folder, "--train-iters", 18, "--global-batch-size", 4)
    resumed = (*steady, *other, "--micro-batch-size", 2, "--override-opt-param-scheduler")
    plain = "--megasft-no-balance"
    window = ("--megasft-cost-window", 2, "--megasft-packings", 2, "--train-iters", 10)

    saved = ("--train-iters", 3, "--save", folder, "--save-interval", 3)
    dealt = world.flags("dealt1", *steady, *saved)
    sorted2 = world.flags("windowed2", *steady, *window)
    first = train(2, [dealt, sorted2], world.folder / "w-dealt")
    rest = [
        world.flags("plain1", *steady, "--train-iters", 3, plain),
        world.flags("plain2", *resumed, plain),
        world.flags("dealt2", *resumed),
        world.flags("windowed1", *steady, *window),
    ]
    second = train(1, rest, world.folder / "w-plain")

    assert "balance: the slowest of 2 data-parallel ranks takes 1." in first
    assert second.count("trained where they come, since --megasft-no-balance is given") == 2
    losses = {name: scalars(world.folder / name)["lm loss"] for name in RUNS}
    assert losses["dealt1"] == pytest.approx(losses["plain1"], rel=2e-5)
    assert losses["dealt2"] == pytest.approx(losses["plain2"], rel=2e-5)
    assert sorted(losses["dealt2"]) == list(range(4, 19))
    assert len({round(loss, 3) for loss in losses["dealt2"].values()}) > 10
    assert losses["windowed1"] == pytest.approx(losses["windowed2"], rel=2e-5)
    assert all(losses["windowed1"][step] != losses["plain1"][step] for step in (1, 2, 3))
    assert "in 2 packings, one an epoch: 150 samples" in first
