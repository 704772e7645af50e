"""The run is kept beside its checkpoints, and a later start says what it changed."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.launch import saved
from megasft.launch.run import Run, resolve


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
