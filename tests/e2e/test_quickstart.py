"""The quickstart as its reader runs it, with few steps: text to a Hugging Face folder and back."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.megatron.runs import ROOT

pytestmark = pytest.mark.slow


def test_the_quickstart_goes_all_the_way_and_ends_with_its_expected_lines(tmp_path: Path) -> None:
    """Every script, both layouts, both conversions; whether it learns is for `make demo`."""
    demo = tmp_path / "demo"
    result = subprocess.run(
        ["examples/quickstart/run.sh"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"DEMO_DIR": str(demo), "DEMO_STEPS": "2"},
        check=False,
    )

    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    first, last, folder = result.stdout.strip().splitlines()[-3:]
    assert first.startswith("first loss 7.") and first.endswith("at step 1")
    assert last.startswith("last loss ") and "at step 2" in last
    assert folder == f"Hugging Face checkpoint: {demo}/trained-hf"
    assert (demo / "loss.png").stat().st_size > 10_000
    assert (demo / "run.png").stat().st_size > 10_000
    steps = (demo / "checkpoints" / "log" / "steps.jsonl").read_text().splitlines()
    losses = [step for step in map(json.loads, steps) if "loss" in step]
    assert [step["steps"] for step in losses] == [1, 2]
    assert first.split()[2] == f"{losses[0]['loss']:.4f}"
    assert list((demo / "tensorboard").glob("events.out.tfevents.*"))
    before, after = (load_file(demo / f / "model.safetensors") for f in ("hf", "trained-hf"))
    assert before.keys() == after.keys()
    moved = [not np.array_equal(before[name], after[name]) for name in before]
    assert all(moved), "every weight must have been trained and brought back"


def test_a_demo_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")

    result = subprocess.run(
        ["examples/quickstart/run.sh"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"DEMO_DIR": str(tmp_path / "demo")},
        check=False,
    )

    assert result.returncode == 1 and "was not made by this script" in result.stderr
    assert (tmp_path / "demo" / "thesis.txt").exists()
