"""Starts groups of ranks by forking a warm process, which starts with the first group.

``tests.rank_server`` says why, and what it costs. A ``Group`` is polled, waited for and terminated
as a ``subprocess.Popen`` is, so it stands in where product code starts torchrun.
"""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.rank_server import READY, Request

ROOT = Path(__file__).resolve().parents[1]
CPU_ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The warm process; it ends with its socket, which the session's end closes in any case."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # the server's as long as it runs
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.rank_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                cwd=ROOT,
                env=os.environ | CPU_ENV,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.close)
        if self.control.recv(len(READY)) != READY:
            self.log.seek(0)
            log = self.log.read().decode(errors="replace")
            raise RuntimeError(f"the server of ranks did not start\n{log[-4000:]}")

    def close(self) -> None:
        self.control.close()
        self.process.wait()

    def start(self, request: Request, *, stdout: int, stderr: int) -> socket.socket:
        """Fork a group and return its connection: its exit code comes on it; closing ends it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps(asdict(request)).encode()
            socket.send_fds(self.control, [message], [theirs.fileno(), stdout, stderr])
        return ours


server = cache(Server)


class Group:
    """Ranks that run a module, started where torchrun would be.

    Args:
        world_size: Ranks.
        command: ``-m``, the module and its arguments.
        stdout: File that all ranks print to; ``stderr`` may be the same.
    """

    def __init__(
        self,
        world_size: int,
        command: Sequence[str],
        *,
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> None:
        dash_m, module, *argv = command
        assert dash_m == "-m", f"only modules are run here, not {dash_m}"
        self.returncode: int | None = None
        request = Request(
            world_size=world_size,
            module=module,
            argv=argv,
            environment=os.environ | CPU_ENV,
            folder=str(ROOT),
            port=free_port(),
        )
        self.connection = server().start(request, stdout=stdout.fileno(), stderr=stderr.fileno())

    def wait(self, timeout: float | None = None) -> int:
        """Return the first exit code that is not 0, and 0 when all are.

        Raises:
            subprocess.TimeoutExpired: And the group is ended.
        """
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                # Nothing comes from a supervisor that was killed itself.
                self.returncode = int(self.connection.recv(16) or -9)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a group of ranks", timeout or 0.0) from None
            finally:
                self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code once there is one."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def terminate(self) -> None:
        """End all ranks and what they started."""
        self.connection.shutdown(socket.SHUT_WR)
