"""Launches training runs for tests and reads what they logged."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from megasft.proof.prove import TRAINING
from megasft.ranks.group import end, free_port, start

__all__ = ["CPU_ENV", "ROOT", "free_port", "scalars", "torchrun", "train"]

ROOT = Path(__file__).resolve().parents[2]
CPU_ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(world_size: int, *command: str, timeout: float = 600, is_warm: bool = True) -> str:
    """Run a module on ``world_size`` CPU ranks; fail with the end of its output.

    Args:
        world_size: Ranks.
        command: ``-m``, the module and its arguments.
        timeout: Seconds, after which the ranks are ended.
        is_warm: Whether ranks are forked by ``megasft.ranks``, which saves their imports, or
            started by torchrun itself.
    """
    dash_m, *module = command
    assert dash_m == "-m", f"only modules are run here, not {dash_m}"
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with chdir(ROOT):
            ranks = start(
                *(world_size, *module),
                output=stdout,
                errors=stderr,
                imports=TRAINING,
                is_warm=is_warm,
            )
        try:
            code = ranks.wait(timeout)
        except subprocess.TimeoutExpired:
            end(ranks)
            raise
        stdout.seek(0)
        stderr.seek(0)
        output = stdout.read() + stderr.read()
    assert code == 0, f"exit code {code}\n{output[-6000:]}"
    return output


def train(world_size: int, runs: Sequence[Sequence[str]], folder: Path) -> str:
    """Run the training entry point once per list of flags, all in one process group."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "runs.json"
    listing.write_text(json.dumps([list(map(str, flags)) for flags in runs]))
    return torchrun(world_size, "-m", "tests.megatron.worker", str(listing))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a run: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }
