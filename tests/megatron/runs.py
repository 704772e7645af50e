"""Launches training runs for tests and reads what they logged."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(world_size: int, *command: str, timeout: float = 600) -> str:
    """Run a module on ``world_size`` CPU ranks; fail with the end of its output."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    result = subprocess.run(
        [*launcher, "--nproc-per-node", str(world_size), *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | CPU_ENV,
        timeout=timeout,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"exit code {result.returncode}\n{output[-6000:]}"
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
