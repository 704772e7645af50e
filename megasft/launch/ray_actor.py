"""The actor that holds a place on a Ray cluster and runs one rank in it.

A file of its own because Ray imports it on every node for every rank: what it imports is what each
of these processes costs beside the rank, and torch alone would be 500 MB.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

KEPT_LINES: Final = 400
"""Of a rank's output, returned when it ends."""
SECONDS_TO_STOP: Final = 30.0
"""For a rank that is asked to end, before it is killed."""


class Seat(NamedTuple):
    """Where an actor is.

    Attributes:
        gpus: That Ray gave it, as CUDA numbers them on the node.
    """

    node: str
    address: str
    gpus: tuple[str, ...]


class Outcome(NamedTuple):
    """How a rank ended, with the end of what it said."""

    rank: int
    exit_code: int
    lines: list[str]


class RankActor:
    """Holds a place on the cluster and runs one rank in it. An actor with two threads."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def seat(self) -> Seat:
        """Say where this is."""
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Seat(
            ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), tuple(ids)
        )

    def free_port(self) -> int:
        """Return a port nobody listens on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def run(self, words: list[str], environ: dict[str, str], folder: str, log: str) -> Outcome:
        """Run the rank to its end; what it prints goes to a log and, through Ray, to the driver.

        Args:
            words: The command.
            environ: Its whole environment.
            folder: Its current directory.
            log: File for all it prints.
        """
        rank = int(environ["RANK"])
        lines: deque[str] = deque(maxlen=KEPT_LINES)
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        shown = rank in (0, int(environ["WORLD_SIZE"]) - 1)
        with Path(log).open("w") as file:
            self._child = subprocess.Popen(
                words,
                env=environ,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert self._child.stdout is not None
            for line in self._child.stdout:
                file.write(line)
                file.flush()
                lines.append(line.rstrip("\n"))
                if shown:
                    sys.stdout.write(f"[rank{rank}]:{line}")
                    sys.stdout.flush()
        return Outcome(rank, self._child.wait(), list(lines))

    def stop(self) -> None:
        """End the rank: asked first, then killed."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            child.kill()
