"""Ranks that are forked are as new as torchrun's, and end with whatever started them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasft.ranks.group import start
from tests.megatron.runs import ROOT, torchrun

pytestmark = pytest.mark.slow

WORKER = ("-m", "tests.unit.ranks.rank_worker")


@pytest.fixture(params=[True, False], ids=["forked", "torchrun"])
def is_warm(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_a_rank_finds_what_a_new_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    """The same facts from the server and from torchrun; writers import ``__main__`` by its name."""
    monkeypatch.setenv("ONLY_HERE", "set after the server was started")
    torchrun(2, *WORKER, "tell", str(tmp_path), is_warm=is_warm)

    ranks = [read(tmp_path / f"rank{rank}.json") for rank in range(2)]
    draws = [number for rank in ranks for number in rank.pop("random")]
    assert len(set(draws)) == 6, "each rank and each generator draws its own"
    for number, rank in enumerate(ranks):
        assert rank.pop("environment") == {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(number),
            "ONLY_HERE": "set after the server was started",
        }
        assert rank == {
            "threads_before": 1,
            "sum": 3,
            "argv": ["tell", str(tmp_path)],
            "file": "rank_worker.py",
            "writer": 0,
        }
        spawned = read(tmp_path / f"spawned{number}.json")
        assert spawned == {"name": "__mp_main__", "spec": "tests.unit.ranks.rank_worker"}


def pids(folder: Path, *, ranks: int) -> list[int]:
    """Wait until all ranks hang, and return them and what they started."""
    files = [folder / f"pids{rank}.json" for rank in range(ranks)]
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [pid for file in files for pid in json.loads(file.read_text())]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def assert_ended(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while left := [pid for pid in processes if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def test_a_rank_that_fails_ends_the_others_and_its_words_are_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="this rank cannot go on") as error:
        torchrun(2, *WORKER, "fail", str(tmp_path), timeout=60)
    assert "rank 1 ended first, with exit code 1" in str(error.value)
    assert_ended(pids(tmp_path, ranks=1))


def test_a_group_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        torchrun(2, *WORKER, "hang", str(tmp_path), timeout=8)
    assert_ended(pids(tmp_path, ranks=2))


def test_a_group_may_be_polled_and_terminated(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        ranks = start(2, WORKER[1], "hang", str(tmp_path), output=log)
        processes = pids(tmp_path, ranks=2)
        assert ranks.poll() is None
        ranks.terminate()
        assert ranks.wait(60) == ranks.poll() == -signal.SIGTERM
    assert_ended(processes)


def test_nothing_is_left_when_the_session_is_killed(tmp_path: Path) -> None:
    arguments = (2, *WORKER, "hang", str(tmp_path))
    program = f"from tests.megatron.runs import torchrun; torchrun(*{arguments})"
    session = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    processes = pids(tmp_path, ranks=2)
    servers = Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text().split()
    assert len(servers) == 1
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    assert_ended([*processes, int(servers[0])])
