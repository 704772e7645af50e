"""The run is kept beside its checkpoints, and a later start says what it changed."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.errors import FlagError
from megasft.launch import saved
from megasft.launch.run import Run, resolve
from megasft.launch.torchrun import run_here
from tests.other_writer import other_writer


def test_the_kept_file_starts_the_same_run(resolved: Callable[..., Run]) -> None:
    run = resolved("optim.lr=5e-4")

    saved.save(run)

    assert resolve(Path("ckpt/run/run.yaml"), ()).argv == run.argv
    first = Path("ckpt/run/run.yaml").read_text().splitlines()[0]
    assert first == "# megasft train run.yaml optim.lr=5e-4"
    subprocess.run(["bash", "-n", "ckpt/run/run.sh"], check=True)


def test_what_changed_is_told_and_the_earlier_file_stays(
    resolved: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    saved.save(resolved())
    saved.save(resolved())
    assert caplog.text == "" and sorted(os.listdir("ckpt/run")) == ["run.sh", "run.yaml"]

    saved.save(resolved("optim.lr=2e-3", "optim.train_iters=null", "log.log_interval=1"))

    assert (
        "optim.train_iters 4 -> (none); optim.lr 0.001 -> 0.002; log.log_interval (none) -> 1"
        in (caplog.text)
    )
    assert "lr: 0.001" in Path("ckpt/run/run.1.yaml").read_text()
    assert sorted(os.listdir("ckpt/run")) == ["run.1.yaml", "run.sh", "run.yaml"]


def test_nothing_is_kept_where_nothing_is_saved(resolved: Callable[..., Run]) -> None:
    saved.save(resolved("checkpoint.save=null", "checkpoint.save_interval=null"))
    assert not Path("ckpt").exists()


def test_what_a_running_run_has_written_is_left_when_a_second_is_started_there(
    resolved: Callable[..., Run],
) -> None:
    """Before anything is converted, written or started."""
    saved.save(resolved())
    before = {path.name: path.stat().st_mtime_ns for path in Path("ckpt/run").iterdir()}
    with other_writer(Path("ckpt/run")) as first:
        message = f"ckpt/run is being written by process {first.pid} on "
        with pytest.raises(FlagError, match=message):
            run_here(resolved("optim.lr=2e-3"), os.environ)
    after = {path.name: path.stat().st_mtime_ns for path in Path("ckpt/run").iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {".writer.json"}
