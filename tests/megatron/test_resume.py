"""A run resumes from the last whole checkpoint, on another layout, on the same rows only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.megatron.conftest import World
from tests.megatron.runs import CPU_ENV, ROOT, free_port, scalars, train

pytestmark = pytest.mark.slow

STEPS = 6
TRACKER = "latest_checkpointed_iteration.txt"


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


def test_resuming_on_another_layout_continues_the_same_run(
    world: World, uninterrupted: dict[int, float]
) -> None:
    """Saved at TP 2 x CP 2, resumed as DP 2 x PP 2, against a run in one go on one rank.

    Mirrors ``save_checkpoint`` and ``load_checkpoint`` (megatron-core 0.19.2, torch_dist). Does not
    cover the distributed optimizer, which needs Transformer Engine or Apex to load.
    """
    folder = checkpoint_flags(world.folder / "reshaped")
    first = world.flags(
        *("phase1", *folder, "--exit-interval", 3),
        *("--tensor-model-parallel-size", 2, "--context-parallel-size", 2),
    )
    second = world.flags("phase2", *folder, "--pipeline-model-parallel-size", 2)

    output = train(4, [first, second], world.folder / "w4")

    assert "at iteration 3" in output
    losses = [scalars(world.folder / phase)["lm loss"] for phase in ("phase1", "phase2")]
    assert [sorted(part) for part in losses] == [[1, 2, 3], [4, 5, 6]]
    together = losses[0] | losses[1]
    assert together == pytest.approx(uninterrupted, rel=2e-5)


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


def test_starting_a_finished_run_again_ends_at_once(
    world: World, uninterrupted: dict[int, float]
) -> None:
    flags = (*checkpoint_flags(world.folder / "finished"), "--train-iters", 1)
    train(1, [world.flags("once", *flags)], world.folder / "w1e")

    train(1, [world.flags("twice", *flags)], world.folder / "w1f")

    assert "lm loss" not in scalars(world.folder / "twice")


def test_resuming_on_other_rows_is_refused_and_the_difference_named(world: World) -> None:
    folder = checkpoint_flags(world.folder / "rows")
    train(1, [world.flags("rows1", *folder, "--exit-interval", 1)], world.folder / "w1c")

    with pytest.raises(AssertionError, match="checkpoint: seed 11, this run: seed 12"):
        train(1, [world.flags("rows2", *folder, "--seed", 12)], world.folder / "w1d")
