"""The real torchrun with ranks that end in all the ways ranks do."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megasft.launch import command
from megasft.launch import torchrun as launch
from megasft.launch.run import Run
from megasft.launch.torchrun import run_here
from megasft.ranks import torchrun

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def start(
    resolved: Callable[..., Run], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Start two small ranks in a mode, and return the exit code."""
    monkeypatch.setattr(command, "MODULE", "tests.unit.launch.small_rank")

    def run(mode: str, *overrides: str) -> int:
        one = replace(resolved(*overrides), argv=(mode, str(folder)))
        return run_here(one, os.environ | {"PYTHONPATH": str(ROOT)})

    return run


@pytest.mark.slow
def test_the_error_that_began_it_is_the_last_on_screen_though_another_rank_ended_first(
    start: Callable[..., int], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("follow") == 1

    lines = capfd.readouterr().err.strip().splitlines()
    log = lines[-1].removeprefix("all that it printed: ")
    assert lines[-2] == "rank 1 failed first"
    assert lines[-3] == "ValueError: rank one is wrong"
    assert "destroy_process_group" in Path(log).read_text() and Path(log).is_relative_to("ckpt")
    assert "ChildFailedError" not in "\n".join(lines), "torchrun's own page hides the error"


@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_signal_and_ends_the_others(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert start("kill") == 1

    assert time.monotonic() - began < 50  # the other rank would have slept for 60 s
    said = capfd.readouterr().err
    assert "rank 1 was ended first, by signal 9 (SIGKILL)" in said.splitlines()[-2]
    assert said.splitlines()[-3] == "about to take memory"


@pytest.mark.slow
def test_a_fault_that_another_start_would_meet_again_is_not_met_again(
    start: Callable[..., int], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("refuse", "launch.max_restarts=12") != 0

    said = capfd.readouterr().err.splitlines()
    assert said[-3] == "[megasft] error: there is no store" and said[-2].startswith("rank 0 ")
    # torchrun may have started them again before it is told not to; on a busy machine twice.
    assert len(list(folder.glob("refused.1.*"))) <= 6


DEAF = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
log = folder / "run" / "attempt_0" / "0" / "stderr.log"
log.parent.mkdir(parents=True)
log.write_text("[megasft] error: there is no store")
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("failed (exitcode: 1) local_rank: 0 (pid: 7) of binary: x", file=sys.stderr, flush=True)
while len(heard) < 2:
    time.sleep(0.01)
print("Received 15 death signal, shutting down workers", file=sys.stderr, flush=True)
time.sleep(2.5)
sys.exit(10 + len(heard))
"""
"""A torchrun that drops a signal: an error raised while it writes a log line is dropped."""


@pytest.mark.slow
def test_a_torchrun_that_drops_a_signal_gets_it_again_until_it_has_heard_one(
    start: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = [sys.executable, "-c", DEAF]
    monkeypatch.setattr(launch, "torchrun_command", lambda run: [*deaf, str(run.log_dir)])
    assert start("refuse", "launch.max_restarts=12") == 12


PROGRAM = """
import os, sys
from dataclasses import replace
from pathlib import Path
from megasft.launch import command
from megasft.launch.run import resolve
from megasft.launch.torchrun import run_here
from megasft.pretrain_sft import configure_logging

configure_logging(rank=0)
command.MODULE = "tests.unit.launch.small_rank"
sys.exit(run_here(replace(resolve(Path("run.yaml"), ()), argv=("save", ".")), os.environ))
"""


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGTERM to the group", "the terminal is closed"])
def test_a_signal_to_all_processes_of_a_run_saves(
    write_run: Callable[[], Path], folder: Path, end: str
) -> None:
    """As `timeout`, systemd and a terminal signal it; torchrun alone would kill ranks after 1 s.

    Its standard error is the terminal that is gone, so nothing can be printed either.
    """
    write_run()
    ours, theirs = os.openpty()

    def takes_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
        start_new_session=True,
        preexec_fn=takes_terminal,
    )
    os.close(theirs)
    wait_for(*(folder / f"ready.{rank}" for rank in (0, 1)))
    if end == "SIGTERM to the group":
        os.killpg(started.pid, signal.SIGTERM)
        assert started.wait(60) == 0
        said = os.read(ours, 100_000).decode()
        assert "SIGTERM: passed on to 2 ranks" in said and "stopped by a signal" in said
        os.close(ours)
    else:
        os.close(ours)
        started.wait(60)
    assert len(list(folder.glob("saved.*"))) == 2


@pytest.fixture
def stand_in(
    resolved: Callable[..., Run], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Run with a program instead of torchrun; signal this process once the program is ready."""

    def run(program: str, *numbers: signal.Signals, overrides: tuple[str, ...] = ()) -> int:
        torchrun = folder / "torchrun"
        begin = "import os, pathlib, signal, subprocess, sys, time\n"
        torchrun.write_text(f"#!{sys.executable}\n{begin}{program}")
        torchrun.chmod(0o755)
        monkeypatch.setattr(command, "program", lambda name: str(torchrun))

        def sends() -> None:
            # Two at once would be one: each has been seen before the next.
            for number, is_there in zip(numbers, ("ready", "interrupted"), strict=False):
                wait_for(folder / is_there)
                os.kill(os.getpid(), number)

        if numbers:
            threading.Thread(target=sends, daemon=True).start()
        return run_here(resolved(*overrides), os.environ)

    return run


ALREADY_IN_THE_NEXT_ATTEMPT = """
logs = pathlib.Path(sys.argv[sys.argv.index("--log-dir") + 1]) / "megasft"
for attempt, said in ((0, "[megasft] error: there is no store"), (1, "")):
    (logs / f"attempt_{attempt}" / "0").mkdir(parents=True)
    (logs / f"attempt_{attempt}" / "0" / "stderr.log").write_text(said)
print("failed (exitcode: 1) local_rank: 0 (pid: 7) of binary: python", file=sys.stderr, flush=True)
time.sleep(30)
"""


def test_a_fault_is_read_though_torchrun_has_begun_the_next_attempt(
    stand_in: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert stand_in(ALREADY_IN_THE_NEXT_ATTEMPT, overrides=("launch.max_restarts=3",)) != 0
    assert time.monotonic() - began < 20  # it was told to end
    assert capfd.readouterr().err.splitlines()[-3] == "[megasft] error: there is no store"


ENDS_WITH_ITS_RANK = """
code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
signal.signal(signal.SIGINT, lambda *_: pathlib.Path("interrupted").touch())
rank = subprocess.Popen([sys.executable, "-c", f"print(flush=True); {code}"], stdout=-1)
rank.stdout.readline()
pathlib.Path("ready").touch()
pathlib.Path("ended").write_text(str(rank.wait()))
"""


@pytest.mark.parametrize("num_signals", [1, 2])
def test_an_interrupted_run_ends_though_a_rank_does_not(
    stand_in: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, num_signals: int
) -> None:
    """A terminal's Ctrl-C does not reach torchrun, which is in a session of its own."""
    seconds = 0.3 if num_signals == 1 else 50.0  # the second one does not wait
    monkeypatch.setattr(torchrun, "SECONDS_TO_INTERRUPT", seconds)
    began = time.monotonic()

    assert stand_in(ENDS_WITH_ITS_RANK, *[signal.SIGINT] * num_signals) == 130

    assert (folder / "interrupted").exists() and (folder / "ended").read_text() == "-9"
    assert time.monotonic() - began < 30


def test_a_signal_before_the_ranks_have_started_ends_the_run(
    stand_in: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    code = stand_in("pathlib.Path('ready').touch(); time.sleep(60)", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "before the ranks had started" in caplog.text


def test_what_a_user_had_ignored_stays_ignored(stand_in: Callable[..., int], folder: Path) -> None:
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    program = "pathlib.Path('ready').touch(); time.sleep(0.5)"
    try:
        assert stand_in(program, signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_torchrun_does_not_outlive_a_launcher_that_was_killed(tmp_path: Path) -> None:
    """The system tells it when the thread that started it is gone, which is all that ends here."""
    code = (
        "import pathlib, signal, sys\n"
        "signal.signal(15, lambda *_: (pathlib.Path('told').touch(), sys.exit()))\n"
        "pathlib.Path('ready').touch()\n"
        "signal.pause()\n"
    )
    started: list[subprocess.Popen[bytes]] = []

    def launch() -> None:
        words = [sys.executable, "-c", code]
        preexec = torchrun._ends_with_parent()
        started.append(subprocess.Popen(words, cwd=tmp_path, preexec_fn=preexec))
        wait_for(tmp_path / "ready")

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    wait_for(tmp_path / "told")
    assert started[0].wait(30) == 0


def test_without_a_ranks_error_torchruns_own_is_shown(
    resolved: Callable[..., Run],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    failing = folder / "torchrun"
    failing.write_text(
        "#!/bin/bash\necho 'Traceback (most recent call last):' >&2\n"
        "echo 'RendezvousConnectionError: nobody at node0:29500' >&2\nexit 3\n"
    )
    failing.chmod(0o755)
    monkeypatch.setattr(command, "program", lambda name: str(failing))

    assert run_here(resolved(), os.environ) == 3

    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "RendezvousConnectionError: nobody at node0:29500"
