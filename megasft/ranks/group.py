"""Starts the ranks of one machine: forked from a warm process, or by torchrun where that cannot be.

``megasft.ranks.server`` says why, and what it costs. Forks need Linux and CPU ranks. Elsewhere, and
where a package that ranks import starts threads, torchrun starts them, which is slower. Either is
polled, waited for and terminated as a ``subprocess.Popen`` is.
"""

import atexit
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import IO, Any, Final

from megasft.megatron import warm
from megasft.ranks.server import READY, Request

logger = logging.getLogger(__name__)

OF_A_RANK: Final = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_"),
)
"""Starts of the environment variables by which a rank knows its group."""

ON_CPUS: Final = {"CUDA_VISIBLE_DEVICES": ""}

PRELOADED: Final = warm.__name__
"""The module whose ``prepare`` imports, before there are ranks, what any rank imports."""

type Ranks = "subprocess.Popen[bytes] | Group"


def start(
    world_size: int,
    module: str,
    *argv: str,
    output: IO[Any],
    errors: IO[Any] | None = None,
    imports: Sequence[str] = (),
    device: str = "cpu",
    is_warm: bool = True,
) -> Ranks:
    """Start a module on several ranks that share this machine's cores.

    Args:
        world_size: Ranks.
        module: What ``python -m`` would run.
        *argv: The module's arguments.
        output: File that all ranks print to.
        errors: The same for standard error; default: ``output``.
        imports: Modules that it will import; done once, before ranks are forked.
        device: ``cpu`` or ``cuda``.
        is_warm: Fork the ranks where that can be done; else torchrun starts them.
    """
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    environment = {"OMP_NUM_THREADS": threads} | outside_of_a_group(os.environ)
    if device == "cpu":
        environment |= ON_CPUS
        if is_warm and can_fork():
            request = Request(
                world_size=world_size,
                module=module,
                argv=list(argv),
                imports=list(imports),
                environment=environment,
                folder=os.getcwd(),
                port=free_port(),
            )
            return Group(request, output=output, errors=errors or output)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(world_size), "-m", module, *argv],
        stdout=output,
        stderr=errors or output,
        env=environment,
    )


def end(ranks: Ranks) -> None:
    """End ranks that have not ended, and wait for it."""
    if ranks.poll() is None:
        ranks.terminate()
        ranks.wait()


def outside_of_a_group(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what tells this process, maybe a rank itself, its group."""
    return {k: v for k, v in environment.items() if not k.startswith(OF_A_RANK)}


def warm_up() -> None:
    """Let the warm process start its imports, if there will be one, and do not wait for it."""
    if sys.platform == "linux":
        server()


def can_fork() -> bool:
    """Say whether ranks can be forked here; the first call waits for the warm process."""
    return sys.platform == "linux" and server().is_ready()


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The warm process; it ends with its socket, which this process's end closes in any case."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # the server's as long as it runs
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megasft.ranks.server", str(theirs.fileno()), PRELOADED],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env=outside_of_a_group(os.environ) | ON_CPUS | {"OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )
        self.said: bytes | None = None
        atexit.register(self.close)

    def is_ready(self) -> bool:
        """Wait until everything is imported, and say whether that has left no threads.

        Raises:
            RuntimeError: It ended.
        """
        if self.said is None:
            self.said = self.control.recv(16)
            if not self.said:
                self.log.seek(0)
                log = self.log.read().decode(errors="replace")
                raise RuntimeError(f"the process that forks ranks did not start\n{log[-4000:]}")
            if self.said != READY:
                logger.info("a package starts threads when imported: torchrun starts the ranks")
        return self.said == READY

    def close(self) -> None:
        """End the server and the groups it has."""
        self.control.close()
        self.process.wait()

    def start(self, request: Request, *, stdout: int, stderr: int) -> socket.socket:
        """Fork a group and return its connection: its exit code comes on it; closing ends it."""
        self.is_ready()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps(asdict(request)).encode()
            socket.send_fds(self.control, [message], [theirs.fileno(), stdout, stderr])
        return ours


server = cache(Server)


class Group:
    """Ranks that run a module, forked by the warm process; used as a ``subprocess.Popen``."""

    def __init__(self, request: Request, *, output: IO[Any], errors: IO[Any]) -> None:
        self.returncode: int | None = None
        self.connection = server().start(request, stdout=output.fileno(), stderr=errors.fileno())

    def wait(self, timeout: float | None = None) -> int:
        """Return the first exit code that is not 0, and 0 when all are.

        Raises:
            subprocess.TimeoutExpired: The group runs on.
        """
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                # Nothing comes from a supervisor that was killed itself.
                self.returncode = int(self.connection.recv(16) or -9)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a group of ranks", timeout or 0.0) from None
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
