"""A run resumes from the last whole checkpoint, on another layout, on the same rows only."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megasft.cli.main import main
from tests.megatron.conftest import ROW_TOKENS, World
from tests.megatron.resumed_runs import DIES_IN, NUM_ROWS, TRACKER, Runs
from tests.megatron.runs import CPU_ENV, ROOT, free_port, scalars, train

pytestmark = pytest.mark.slow

STEPS = 6

EIGHT = ("--train-iters", STEPS, "--global-batch-size", 8)
SIXTEEN = ("--train-iters", STEPS, "--global-batch-size", 16)


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> dict[int, float]:
    """Losses of a run in one go on one rank."""
    train(1, [world.flags("uninterrupted", "--train-iters", STEPS)], world.folder / "w1")
    losses = scalars(world.folder / "uninterrupted")["lm loss"]
    assert sorted(losses) == list(range(1, STEPS + 1))
    told_apart = {round(loss, 3) for loss in losses.values()}
    assert len(told_apart) == STEPS, "losses must tell steps apart for these tests to say anything"
    return losses


def checkpoint_flags(folder: Path) -> tuple[object, ...]:
    return ("--train-iters", STEPS, "--save", folder, "--load", folder, "--save-interval", 1)


GROWING = ("--step-batch-size-schedule", f"0:8 {24 * ROW_TOKENS}:16", "--train-samples", 72)
"""Three steps of 8 rows, then 16; Megatron 0.19 ignores --rampup-batch-size."""
CONSTANT_RATE = ("--lr-decay-style", "constant", "--override-opt-param-scheduler")

# What is resumed on four ranks: checkpoint, flags, and the run in one go that it must equal.
RESUMED: dict[str, tuple[str, tuple[object, ...], str]] = {
    "pp2_dp2_micro2": (
        "killed_tp2_cp2",
        (*SIXTEEN, "--pipeline-model-parallel-size", 2, "--micro-batch-size", 2),
        "straight",
    ),
    "dp4": ("killed_tp2_cp2", SIXTEEN, "straight"),
    "cp2_pp2": (
        "killed_tp2_cp2",
        (*SIXTEEN, "--context-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        "straight",
    ),
    "growing_tp2_micro2": (
        "killed_growing",
        (*GROWING, *CONSTANT_RATE, "--tensor-model-parallel-size", 2, "--micro-batch-size", 2),
        "straight_growing",
    ),
    "larger_batch": ("killed_batch_of_8", (*SIXTEEN, *CONSTANT_RATE), "straight_growing"),
}

LONG = ("dp4", "cp2_pp2")
"""Layouts of which each dimension is in another one, too."""

OTHER_RATE = (*EIGHT, "--lr", 1e-4, "--lr-decay-style", "constant")
# The run of batches of 8, at a rate of 1e-3, resumed with --lr 1e-4: a switch, and the rate then.
OTHER_RATES = {
    "rate_of_the_flags": ("--override-opt-param-scheduler", 1e-4),
    "rate_of_the_checkpoint": ("--use-checkpoint-opt-param-scheduler", 1e-3),
    "rate_without_moments": ("--no-load-optim", 1e-4),
}


@pytest.fixture(scope="module")
def resumed(world: World) -> Runs:
    """Runs in one go on one rank; runs killed in their fourth step; these resumed elsewhere."""
    runs = Runs(world)
    straight = runs.entry("straight", *SIXTEEN)
    runs.start(1, [straight, runs.entry("straight_growing", *GROWING, *CONSTANT_RATE)])
    runs.start_and_die(
        *(4, "killed_tp2_cp2", *SIXTEEN),
        *("--tensor-model-parallel-size", 2, "--context-parallel-size", 2),
    )
    runs.start_and_die(2, "killed_growing", *GROWING, *CONSTANT_RATE)
    runs.start_and_die(1, "killed_batch_of_8", *EIGHT, *CONSTANT_RATE)
    others = {
        name: ("killed_batch_of_8", (*OTHER_RATE, switch))
        for name, (switch, _) in OTHER_RATES.items()
    }
    go_on(runs, {name: run[:2] for name, run in RESUMED.items() if name not in LONG} | others)
    return runs


def go_on(runs: Runs, wanted: Mapping[str, tuple[str, tuple[object, ...]]]) -> None:
    """Resume killed runs on four ranks: by name, what was killed and the flags."""
    entries = [runs.resume(killed, name, *flags) for name, (killed, flags) in wanted.items()]
    output = runs.start(4, entries)
    assert output.count(f"at iteration {DIES_IN - 1}") >= len(wanted)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in RESUMED]
)
def test_a_killed_run_resumed_on_another_layout_trains_the_rows_and_losses_of_one_go(
    resumed: Runs, name: str
) -> None:
    """Six steps in one go on one rank equal three, kill -9 in the fourth, and three elsewhere.

    The position of a run is one integer, so a wrong row would stay unseen: losses go on looking
    well. Here rows are told by the tokens that the model was given. All runs pass the end of the
    first epoch, one of them at a step that another batch size begins. Mirrors ``save_checkpoint``,
    ``load_checkpoint`` and ``MegatronPretrainingSampler`` (megatron-core 0.19.2, torch_dist). Does
    not cover the distributed optimizer, which needs Transformer Engine or Apex to load.
    """
    if name in LONG:
        go_on(resumed, {name: RESUMED[name][:2]})
    killed, _, one_go = RESUMED[name]
    wanted = resumed.rows(one_go)
    before, after = resumed.rows(killed), resumed.rows(name)

    assert sorted(before) == [1, 2, 3] and sorted(after) == [4, 5, 6]
    assert before | after == wanted
    trained = Counter(row for rows in wanted.values() for row in rows)
    assert set(trained) == set(range(NUM_ROWS)), "the runs must pass the end of an epoch"
    assert set(trained.values()) == {1, 2}, "and begin another one"
    losses = resumed.losses(one_go)
    assert len({round(loss, 3) for loss in losses.values()}) == STEPS, "losses tell steps apart"
    # float32 sums in another order: 1e-6 a step, and three steps of Adam on top.
    expected = {step: losses[step] for step in (4, 5, 6)}
    assert resumed.losses(name) == pytest.approx(expected, rel=2e-5)


def test_rows_trained_in_one_go_are_those_of_the_plan(resumed: Runs) -> None:
    for name, sizes in (("straight", [16] * STEPS), ("straight_growing", [8] * 3 + [16] * 3)):
        ends = np.cumsum([0, *sizes])
        steps = enumerate(pairwise(ends.tolist()), start=1)
        planned = {step: sorted(resumed.order[k] for k in range(*part)) for step, part in steps}
        assert resumed.rows(name) == planned


@pytest.mark.parametrize("name", OTHER_RATES)
def test_another_learning_rate_on_resume_is_that_which_the_switch_says(
    resumed: Runs, name: str
) -> None:
    """Megatron 0.19 finds a checkpoint's groups of parameters by their rates, and keeps these.

    Mirrors ``MegatronOptimizer._filter_and_reorder_param_groups`` and
    ``OptimizerParamScheduler.load_state_dict``. Does not cover the distributed optimizer, which
    needs Transformer Engine or Apex to load.
    """
    steps = (4, 5, 6)
    rates = scalars(resumed.world.folder / name)["learning-rate"]
    assert rates == pytest.approx(dict.fromkeys(steps, OTHER_RATES[name][1]))
    assert sorted(resumed.rows(name)) == [*steps]
    losses = [resumed.losses(each) for each in OTHER_RATES]
    assert len({each[4] for each in losses}) == 1, "all go on from the same weights"
    assert len({each[5] for each in losses}) == 3, "and then by another rate, or other moments"


@pytest.mark.parametrize(
    ("name", "place", "given"),
    [
        (
            "pp2_dp2_micro2",
            "48 rows consumed, epoch 1, 48 of its 62 rows",
            (
                *("--tensor-model-parallel-size", 1, "--context-parallel-size", 1),
                *("--pipeline-model-parallel-size", 2, "--micro-batch-size", 2),
            ),
        ),
        (
            "growing_tp2_micro2",
            "24 rows consumed, epoch 1, 24 of its 62 rows",
            ("--tensor-model-parallel-size", 2, "--micro-batch-size", 2),
        ),
    ],
)
def test_resume_check_names_the_rows_that_the_resumed_run_trains(
    resumed: Runs,
    capsys: pytest.CaptureFixture[str],
    name: str,
    place: str,
    given: tuple[object, ...],
) -> None:
    killed = resumed.folder / RESUMED[name][0]
    with pytest.raises(SystemExit) as end:
        main(["resume-check", str(killed), "--world-size", "4", *map(str, given)])

    out, err = capsys.readouterr()
    assert end.value.code == 0, out + err
    assert place in out
    rows = re.search(rf"iteration {DIES_IN} trains 16 rows: ([\d, ]+)", out)
    assert rows is not None, out
    assert sorted(map(int, rows[1].split(","))) == resumed.rows(name)[DIES_IN]


def kill_while_saving(flags: list[str], folder: Path, listing: Path) -> int:
    """Start a run and kill -9 it between two writes of the tracker; return the last whole step."""
    listing.write_text(json.dumps([flags]))
    # Without torchrun, whose workers would outlive it: the rank itself dies, its writers with it.
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.megatron.worker", str(listing)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | CPU_ENV | rank | {"MASTER_PORT": str(free_port())},
        start_new_session=True,
    )
    half_written = folder / "iter_0000003"
    while not half_written.exists():
        assert process.poll() is None, "the run ended before its third checkpoint"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return int((folder / TRACKER).read_text())


def test_a_run_killed_while_saving_resumes_from_the_last_whole_checkpoint(
    world: World, uninterrupted: dict[int, float]
) -> None:
    folder = world.folder / "killed"
    flags = checkpoint_flags(folder)

    whole = kill_while_saving(world.flags("before", *flags), folder, world.folder / "kill.json")
    assert whole == 2, "the kill came too late to leave a half-written checkpoint"
    output = train(1, [world.flags("after", *flags)], world.folder / "w1b")

    assert "at iteration 2" in output
    losses = scalars(world.folder / "after")["lm loss"]
    assert losses == pytest.approx({k: uninterrupted[k] for k in range(3, STEPS + 1)}, rel=1e-6)
    assert int((folder / TRACKER).read_text()) == STEPS


def test_resuming_on_other_rows_is_refused_and_the_difference_named(world: World) -> None:
    folder = checkpoint_flags(world.folder / "rows")
    train(1, [world.flags("rows1", *folder, "--exit-interval", 1)], world.folder / "w1c")

    with pytest.raises(AssertionError, match="checkpoint: seed 11, this run: seed 12"):
        train(1, [world.flags("rows2", *folder, "--seed", 12)], world.folder / "w1d")
