"""Starts a run's ranks on a node by torchrun and follows them: signals, restarts, first error.

torchrun restarts ranks and meets other nodes; neither is done again here. It is a process of its
own, started by the very command ``--dry-run`` prints, and its standard error is read on the way to
the screen, because that is where it says which rank ended.

It is in a session of its own. ``timeout``, systemd and a closed terminal signal a whole group of
processes, and torchrun would kill ranks that take longer to save than its shutdown timeout, 30 s
before torch 2.12. So signals come here alone and go to the ranks; when this process is killed, the
system sends SIGTERM to torchrun, which does the same within its timeout.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Final

import psutil

from megasft.ranks import failure

logger = logging.getLogger(__name__)

PASSED_ON: Final = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR1,
}
"""Signals that end a run, and what the ranks get, which know two of them."""
SECONDS_TO_END: Final = 5.0
"""For torchrun, after its ranks have ended on a signal."""
SECONDS_TO_HEAR: Final = 2.0
"""Between two SIGTERMs to a torchrun that has not said that it heard one."""
SECONDS_TO_INTERRUPT: Final = 10.0
"""For ranks after Ctrl-C, which does not save; then they are killed."""
INTERRUPTED: Final = 130
PR_SET_PDEATHSIG: Final = 1


class Torchrun:
    """A torchrun that is started and followed.

    Args:
        command: That starts it.
        environ: Its whole environment, and that of the ranks.
        log_dir: What the command names with ``--log-dir``.
        max_restarts: What it names with that.
        node: This one's number, of a run on several.

    Attributes:
        was_stopped: Whether its ranks were asked to end before they had finished.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        log_dir: Path,
        max_restarts: int,
        node: int | None,
    ) -> None:
        self._command, self._environ = command, environ
        self._log_dir, self._max_restarts, self._node = log_dir, max_restarts, node
        self._earlier = set(_run_folders(log_dir))
        self._ended: list[failure.Ended] = []
        self._lasting: failure.Failure | None = None
        self._was_interrupted = False
        self._ended_early: signal.Signals | None = None
        self._was_heard = threading.Event()
        self.was_stopped = False
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Return torchrun's exit code; after a failure the first error is the last on screen."""
        with self._signals():
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_ends_with_parent(),
            )
            if self._ended_early is not None or self._was_interrupted:
                self._end()
            assert self._process.stderr is not None
            report = self._pass_on(self._process.stderr)
            code = self._process.wait()
        if self._was_interrupted:
            return INTERRUPTED
        if code != 0 and self._ended_early is not None:
            return 128 + self._ended_early
        return 0 if code == 0 else self._failed(code, report)

    def _failed(self, code: int, report: list[str]) -> int:
        """Print the error that began it, and return an exit code."""
        ended = self._ended[-1] if self._ended else None
        found = self._lasting or failure.first_failure(self._logs(), ended)
        # Without a rank's error, torchrun's own is what is left: a rendezvous that failed.
        _show("".join(report) if found is None else f"\n{found.message(node=self._node)}\n")
        # A signal's number is no exit code.
        return code if code > 0 else 128 - code

    def _pass_on(self, stream: IO[str]) -> list[str]:
        """Copy torchrun's standard error to ours; keep its own tracebacks back and return them."""
        report: list[str] = []
        for line in stream:
            is_report = bool(report) or line.startswith("Traceback (most recent call last)")
            if is_report and not line.startswith("[rank"):
                report.append(line)
                continue
            _show(line)
            if failure.seen_signal(line):
                self._was_heard.set()
            if (ended := failure.seen_ended(line)) is not None:
                self._ended.append(ended)
                self._announce_restart(ended)
        return report

    def _announce_restart(self, ended: failure.Ended) -> None:
        """Say that torchrun starts the ranks again, or keep it from doing so in vain."""
        restarts = self._max_restarts
        if (number := len(self._ended)) > restarts or self.was_stopped or self._lasting is not None:
            return
        found = failure.first_failure(self._logs(), ended)
        if found is not None and found.is_lasting:
            self._lasting = found
            self._end()
            return
        logger.warning(
            "rank %d ended with exit code %d; restart %d of %d, from the last checkpoint",
            *(ended.rank, ended.exit_code, number, restarts),
        )

    def _logs(self) -> dict[int, Path]:
        """Return the standard error of each rank, of the attempt that failed last."""
        new = [folder for folder in _run_folders(self._log_dir) if folder not in self._earlier]
        attempts = {_number(a): a for folder in new for a in folder.glob("attempt_*")}
        if not attempts:
            return {}
        # torchrun may have begun the next one, which has said nothing yet.
        failed = attempts.get(len(self._ended) - 1, attempts[max(attempts)])
        return {int(path.parent.name): path for path in failed.glob("*/stderr.log")}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def passes(number: int, frame: FrameType | None) -> None:
            self._stop(signal.Signals(number))

        def interrupts(number: int, frame: FrameType | None) -> None:
            self._interrupt()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = dict.fromkeys(PASSED_ON, passes) | {signal.SIGINT: interrupts}
        # What is ignored stays so: SIGHUP under nohup, SIGINT of a job in the background.
        before = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ranks(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            return list(psutil.Process(self._process.pid).children())
        except psutil.NoSuchProcess:
            return []

    def _stop(self, number: signal.Signals) -> None:
        """Have the ranks save and end by themselves, and torchrun after them."""
        ranks = self._ranks()
        self.was_stopped = True
        if not ranks:
            logger.warning("%s: ended before the ranks had started", number.name)
            self._ended_early = number
            if self._process is not None:
                self._end()
            return
        passed_on = PASSED_ON[number]
        name = number.name if passed_on == number else f"{number.name} as {passed_on.name}"
        logger.warning("%s: passed on to %d ranks", name, len(ranks))
        _signal_all(ranks, passed_on)
        if passed_on == signal.SIGTERM:
            threading.Thread(target=self._end_after, args=(ranks,), daemon=True).start()

    def _end_after(self, ranks: list[psutil.Process]) -> None:
        """End torchrun when its ranks have ended and it starts them again."""
        psutil.wait_procs(ranks)
        if not self._has_ended(within=SECONDS_TO_END):
            self._terminate()

    def _end(self) -> None:
        """End torchrun, and go on reading what it says."""
        threading.Thread(target=self._terminate, daemon=True).start()

    def _terminate(self) -> None:
        """Send SIGTERM until torchrun has heard it.

        Its handler raises an error, and ``logging`` drops one that is raised while it writes a
        line: the ranks would be started again as if nothing had come.
        """
        assert self._process is not None
        while not self._was_heard.is_set():
            self._process.terminate()
            if self._has_ended(within=SECONDS_TO_HEAR):
                return

    def _has_ended(self, *, within: float) -> bool:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within)
        return self._process.poll() is not None

    def _interrupt(self) -> None:
        """End the ranks without saving; kill them when they take long or are interrupted twice."""
        is_second, self._was_interrupted = self._was_interrupted, True
        if self._process is None:
            return
        if is_second:
            _signal_all(self._ranks(), signal.SIGKILL)
            return
        logger.warning("SIGINT: the ranks end without saving (SIGTERM saves); again: at once")
        self._process.send_signal(signal.SIGINT)
        threading.Thread(target=self._kill_after, args=(self._ranks(),), daemon=True).start()

    @staticmethod
    def _kill_after(ranks: list[psutil.Process]) -> None:
        _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_INTERRUPT)
        _signal_all(alive, signal.SIGKILL)


def _signal_all(ranks: list[psutil.Process], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _ends_with_parent() -> Callable[[], None] | None:
    """Return what makes the system end a child when this process dies, where a system can.

    Linux sends the signal when the thread that started the child ends; here it is the main one.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _show(text: str) -> None:
    """Print to the screen; a closed terminal takes it away, and the ranks go on to save."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _run_folders(log_dir: Path) -> list[Path]:
    return sorted(log_dir.iterdir()) if log_dir.is_dir() else []


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt_"))
