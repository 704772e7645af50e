"""The real torchrun with ranks that end in all the ways ranks do."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megasft.launch import command
from megasft.launch.run import Run
from megasft.launch.torchrun import run_here

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
    assert start("refuse", "launch.max_restarts=3") != 0

    said = capfd.readouterr().err.splitlines()
    assert said[-3] == "[megasft] error: there is no store" and said[-2].startswith("rank 0 ")
    # torchrun may have begun to start them when it is told not to.
    assert len(list(folder.glob("refused.1.*"))) <= 2


@pytest.mark.slow
def test_a_signal_goes_to_the_ranks_which_end_well(
    start: Callable[..., int], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("ready.*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert start("save") == 0

    assert len(list(folder.glob("saved.*"))) == 2
    assert "SIGTERM: passed on to 2 ranks" in caplog.text and "stopped by a signal" in caplog.text


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
