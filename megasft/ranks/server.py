"""A process that has imported what training ranks import, and forks them on request.

Importing torch, Megatron and transformers costs a rank 10 s of CPU, and a proof starts 15 ranks,
the tests hundreds. Chosen: one warm process (started by ``megasft.ranks.group``), and a fork per
rank, which costs 30 ms. Rejected: long-lived ranks that take one run after another, because a rank
must start with nothing left of the last one. The price: ranks share a seed of string hashes, and
see torch as ``megatron/cpu.py`` prepares it. CUDA does not survive a fork: this is for CPU ranks.

Forking is safe before there are threads only, so this process starts none and checks that. A group
is a supervisor and its ranks, in a session of their own. It ends when its ranks do, when one of
them fails, or when its connection closes, as it does however the process that asked for it ends.

Usage: python -m megasft.ranks.server DESCRIPTOR MODULE: a socket on which requests come, see
``Request``; and the module whose ``prepare`` imports what any rank imports.
"""

import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, NoReturn

GRACE_SECONDS: Final = 2.0
"""How long the others may take to end by themselves, and say why, once one rank has failed."""

KILL_WITH_PARENT: Final = 1
"""PR_SET_PDEATHSIG of Linux."""

READY: Final = b"ready"
THREADS: Final = b"threads"
"""What is sent once: that requests may come, or that a package's threads forbid to fork."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A group to start; its connection and where it prints come as descriptors beside it.

    Attributes:
        world_size: Ranks.
        module: What ``python -m`` would run.
        argv: The module's arguments.
        imports: What it will import; done once, before ranks are forked.
        environment: All of it, but for what tells ranks apart.
        port: A free one, for the ranks to meet.
    """

    world_size: int
    module: str
    argv: list[str]
    imports: list[str]
    environment: dict[str, str]
    folder: str
    port: int


@dataclass(frozen=True, slots=True)
class Rank:
    """What a forked process is to run."""

    request: Request
    number: int


def main() -> None:
    """Import, say so, and serve; see the module's docstring."""
    control = socket.socket(fileno=int(sys.argv[1]))
    before = dict(os.environ)
    importlib.import_module(sys.argv[2]).prepare()
    freeze()
    control.send(READY if num_threads() == 1 else THREADS)
    rank = serve(control, before)
    # Here there is a rank in each fork, with next to nothing of this program on its stack: what it
    # runs ends, and is cleared up after, as the main program of a process.
    if rank is not None:
        become(rank)


def import_all(names: Iterable[str]) -> None:
    """Import modules, and keep them from being copied in the ranks."""
    new = [name for name in names if name not in sys.modules]
    for name in new:
        importlib.import_module(name)
    if new:
        freeze()


def freeze() -> None:
    """Leave what is there out of garbage collection.

    Ranks share pages until they write to them, as a collector does on all it looks at.
    """
    gc.collect()
    gc.freeze()


def serve(control: socket.socket, before: dict[str, str]) -> Rank | None:
    """Fork groups until requests end; return in each rank, and at the end with nothing.

    Args:
        control: Where requests come.
        before: Environment without what imports have set.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
        reap(os.WNOHANG if message else 0)
        if not message:
            return None
        request = Request(**json.loads(message))
        import_all(request.imports)
        assert num_threads() == 1, f"forking with {num_threads()} threads is not safe"
        server = os.getpid()
        if os.fork() == 0:
            die_with(server)
            control.close()
            of_imports = {k: v for k, v in os.environ.items() if k not in before}
            request = replace(request, environment=of_imports | request.environment)
            return start_group(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def reap(options: int) -> None:
    """Wait for supervisors that have ended, so that their time is counted as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def num_threads() -> int:
    """Return the threads of this process, those that Python did not start included."""
    return len(os.listdir("/proc/self/task"))


def start_group(request: Request, connection: int, stdout: int, stderr: int) -> Rank:
    """Fork the ranks, and return in each of them; the supervisor stays here until they end."""
    os.setsid()
    supervisor, left = os.getpid(), {}
    for number in range(request.world_size):
        pid = os.fork()
        if pid == 0:
            die_with(supervisor)
            os.close(connection)
            for stream, descriptor in ((1, stdout), (2, stderr)):
                os.dup2(descriptor, stream)
                os.close(descriptor)
            return Rank(request, number)
        left[pid] = number
    return supervise(left, socket.socket(fileno=connection), stderr)


def die_with(parent: int) -> None:
    """Let Linux kill this process when the one that forked it ends."""
    ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call
        os._exit(1)


def supervise(left: dict[int, int], connection: socket.socket, stderr: int) -> NoReturn:
    """Wait for the ranks, tell the exit code of the first that failed, and end the whole group."""
    code, deadline = 0, float("inf")
    while left and time.monotonic() < deadline:
        is_closed, _, _ = select.select([connection], [], [], 0.02)
        if is_closed:
            code = code or -signal.SIGTERM
            break
        while left and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            number = left.pop(ended[0])
            found = os.waitstatus_to_exitcode(ended[1])
            if found != 0 and code == 0:
                code, deadline = found, time.monotonic() + GRACE_SECONDS
                os.write(stderr, f"rank {number} ended first, {in_words(code)}\n".encode())
    try:
        connection.send(str(code).encode())
    finally:
        os.killpg(0, signal.SIGKILL)  # ranks that are left, what ranks started, this process
    raise AssertionError("not reached")


def in_words(code: int) -> str:
    """Return how a process ended, as torchrun words it.

    Example:
        >>> in_words(-9)
        'Signal 9 (SIGKILL)'
    """
    name = signal.Signals(-code).name if code < 0 else ""
    return f"Signal {-code} ({name})" if name else f"with exit code {code}"


def become(rank: Rank) -> None:
    """Run the module as ``python -m`` under torchrun would."""
    import torch

    request = rank.request
    os.environ.clear()
    os.environ |= request.environment
    number, size = str(rank.number), str(request.world_size)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request.port)}
    os.chdir(request.folder)
    draw_anew()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # read when torch was imported
    sys.argv = [request.module, *request.argv]
    # Puts the module under its own __spec__ in sys.modules["__main__"], which is what spawned
    # checkpoint writers import again.
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def draw_anew() -> None:
    """Seed what a new process has at random."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.default_generator.seed()


if __name__ == "__main__":
    main()
