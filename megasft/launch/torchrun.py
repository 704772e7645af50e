"""Starts this node's ranks by torchrun and stays with them: signals, restarts, the first error.

torchrun restarts ranks and meets other nodes; neither is done again here. It is a process of its
own, started by the very command ``--dry-run`` prints, and its standard error is read on the way to
the screen, because that is where it says which rank ended.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Final

import psutil

from megasft.launch import failure, prepare, saved
from megasft.launch.command import torchrun_command
from megasft.launch.run import Run

logger = logging.getLogger(__name__)

PASSED_ON: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_TO_END: Final = 5.0
"""For torchrun, after its ranks have ended on a signal."""
INTERRUPTED: Final = 130


def run_here(run: Run, environ: Mapping[str, str]) -> int:
    """Convert, train on this node's ranks, export; return the exit code.

    Args:
        run: Of the backend ``local`` or ``torchrun``.
        environ: Of the ranks and the conversions, without ``launch.env``.
    """
    environ = dict(environ) | run.environment
    if run.conversion is not None:
        prepare.convert(run.conversion, environ)
    is_first_node = run.launch.this_node == 0
    if is_first_node:
        saved.save(run)
    agent = _Agent(run, environ)
    code = agent.wait()
    if code == 0 and is_first_node:
        if agent.was_stopped:
            logger.warning("stopped by a signal; the same command goes on from the last checkpoint")
        else:
            prepare.export(run, environ)
    return code


class _Agent:
    """A running torchrun.

    Attributes:
        was_stopped: Whether its ranks were asked to end before they had finished.
    """

    def __init__(self, run: Run, environ: Mapping[str, str]) -> None:
        self._run = run
        self._earlier = set(_run_folders(run.log_dir))
        self._ended: list[failure.Ended] = []
        self._lasting: failure.Failure | None = None
        self._was_interrupted = False
        self.was_stopped = False
        self._process = subprocess.Popen(
            torchrun_command(run), env=environ, stderr=subprocess.PIPE, text=True, errors="replace"
        )

    def wait(self) -> int:
        """Return torchrun's exit code; after a failure the first error is the last on screen."""
        assert self._process.stderr is not None
        with self._signals():
            report = self._pass_on(self._process.stderr)
            code = self._process.wait()
        if self._was_interrupted:
            return INTERRUPTED
        if code != 0:
            ended = self._ended[-1] if self._ended else None
            found = self._lasting or failure.first_failure(self._logs(), ended)
            # Without a rank's error, torchrun's own is what is left: a rendezvous that failed.
            launch = self._run.launch
            node = launch.this_node if launch.nnodes > 1 else None
            sys.stderr.write(
                "".join(report) if found is None else f"\n{found.message(node=node)}\n"
            )
            # A signal's number is no exit code.
            return code if code > 0 else 128 - code
        return 0

    def _pass_on(self, stream: IO[str]) -> list[str]:
        """Copy torchrun's standard error to ours; keep its own tracebacks back and return them."""
        report: list[str] = []
        for line in stream:
            is_report = bool(report) or line.startswith("Traceback (most recent call last)")
            if is_report and not line.startswith("[rank"):
                report.append(line)
                continue
            sys.stderr.write(line)
            sys.stderr.flush()
            if (ended := failure.seen_ended(line)) is not None:
                self._ended.append(ended)
                self._announce_restart(ended)
        return report

    def _announce_restart(self, ended: failure.Ended) -> None:
        """Say that torchrun starts the ranks again, or keep it from doing so in vain."""
        restarts = self._run.launch.max_restarts
        if (number := len(self._ended)) > restarts or self.was_stopped:
            return
        found = failure.first_failure(self._logs(), ended)
        if found is not None and found.is_lasting:
            self._lasting = found
            self._process.terminate()
            return
        logger.warning(
            "rank %d ended with exit code %d; restart %d of %d, from the last checkpoint",
            *(ended.rank, ended.exit_code, number, restarts),
        )

    def _logs(self) -> dict[int, Path]:
        """Return the standard error of each rank, of the last attempt."""
        new = [folder for folder in _run_folders(self._run.log_dir) if folder not in self._earlier]
        attempts = [(_number(a), a) for folder in new for a in folder.glob("attempt_*")]
        if not attempts:
            return {}
        _, last = max(attempts)
        return {int(path.parent.name): path for path in last.glob("*/stderr.log")}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def passes(number: int, frame: FrameType | None) -> None:
            self._signal_ranks(number)

        def interrupts(number: int, frame: FrameType | None) -> None:
            # A terminal has sent it to torchrun too, which ends the ranks.
            self._was_interrupted = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, passes) for number in PASSED_ON}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupts)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signal_ranks(self, number: int) -> None:
        """Give a signal to the ranks: they save and end by themselves, and torchrun after them.

        torchrun itself would kill a rank that takes longer than half a minute to save.
        """
        try:
            ranks = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return
        logger.warning("%s: passed on to %d ranks", signal.Signals(number).name, len(ranks))
        for rank in ranks:
            if rank.is_running():
                os.kill(rank.pid, number)
        self.was_stopped = True
        if number == signal.SIGTERM:
            threading.Thread(target=self._end_after, args=(ranks,), daemon=True).start()

    def _end_after(self, ranks: list[psutil.Process]) -> None:
        """End torchrun when its ranks have ended and it starts them again."""
        psutil.wait_procs(ranks)
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.terminate()


def _run_folders(log_dir: Path) -> list[Path]:
    return sorted(log_dir.iterdir()) if log_dir.is_dir() else []


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt_"))
