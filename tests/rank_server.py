"""A process that has imported what training ranks import, and forks them on request.

Importing torch, Megatron and transformers costs a rank 5 s of CPU, and the tests start hundreds.
Chosen: one warm process per test session (started by ``tests.ranks``), and a fork per rank, which
costs 30 ms. Rejected: long-lived ranks that take one run after another, because a rank must start
with nothing left of the last one. The price: ranks of one session share a seed of string hashes,
and see torch as ``megasft.cpu`` prepares it; tests that must not are started by torchrun itself.

Forking is safe before there are threads only, so this process starts none and checks that. A group
is a supervisor and its ranks, in a session of their own. It ends when its ranks do, when one of
them fails, or when its connection closes, as it does however the test session ends.

Usage: python -m tests.rank_server DESCRIPTOR, a socket on which requests come; see ``Request``.
"""

import argparse
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
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

IMPORTED = (
    "megasft.pretrain_sft",
    "megasft.proof.defects",
    "megasft.training.arguments",
    "megasft.training.datasets",
    "megasft.training.forward_step",
    "megasft.training.global_batch",
    "megasft.training.hooks",
    "megasft.training.model",
    "megasft.training.model_builder",
    "megasft.training.resume",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.text_tokenizer",
    "megatron.training.argument_utils",
    "megatron.training.checkpointing",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
"""What ranks import, but for the modules they run."""

GRACE_SECONDS = 2.0
"""How long the others may take to end by themselves, and say why, once one rank has failed."""

KILL_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""

READY = b"ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A group to start; its connection and where it prints come as descriptors beside it.

    Attributes:
        world_size: Ranks.
        module: What ``python -m`` would run.
        argv: The module's arguments.
        environment: All of it, but for what tells ranks apart.
        port: A free one, for the ranks to meet.
    """

    world_size: int
    module: str
    argv: list[str]
    environment: dict[str, str]
    folder: str
    port: int


@dataclass(frozen=True, slots=True)
class Rank:
    """What a forked process is to run."""

    request: Request
    number: int


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    of_imports = import_everything()
    control.send(READY)
    rank = serve(control)
    # Here there is a rank in each fork, with next to nothing of this program on its stack: what it
    # runs ends, and is cleared up after, as the main program of a process.
    if rank is not None:
        become(rank, of_imports)


def import_everything() -> dict[str, str]:
    """Import it, and return the environment variables that this has set."""
    from megasft import cpu

    before = dict(os.environ)
    cpu.prepare()
    cpu.skip_missing_makefile()
    cpu.remember_sources()
    for name in IMPORTED:
        importlib.import_module(name)
    # Ranks inherit the sources that Megatron's parser takes the help of its flags from.
    arguments = importlib.import_module("megatron.training.arguments")
    arguments.add_megatron_arguments(argparse.ArgumentParser())
    # What no rank will free need not be copied when a rank's collector looks at it.
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if name not in before}


def serve(control: socket.socket) -> Rank | None:
    """Fork groups until the test session ends; return in each rank, and at the end with nothing."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
        reap(os.WNOHANG if message else 0)
        if not message:
            return None
        assert_no_threads()
        server = os.getpid()
        if os.fork() == 0:
            die_with(server)
            control.close()
            return start_group(Request(**json.loads(message)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def reap(options: int) -> None:
    """Wait for supervisors that have ended, so that their time is counted as the session's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def assert_no_threads() -> None:
    native = len(os.listdir("/proc/self/task"))
    assert threading.active_count() == native == 1, f"forking with {native} threads is not safe"


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
    name = signal.Signals(-code).name if code < 0 else ""
    return f"Signal {-code} ({name})" if name else f"with exit code {code}"


def become(rank: Rank, of_imports: dict[str, str]) -> None:
    """Run the module as ``python -m`` under torchrun would."""
    request = rank.request
    os.environ.clear()
    os.environ |= of_imports | request.environment
    number, size = str(rank.number), str(request.world_size)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request.port)}
    os.chdir(request.folder)
    draw_anew()
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
