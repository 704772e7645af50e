"""Every recipe's CPU twin: its own run.yaml, a tiny model of its family, four ranks, two steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.runs import ROOT

pytestmark = pytest.mark.slow

RECIPES = ("qwen3_8b", "qwen3_30b_a3b", "llama31_70b", "long_context_128k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that data and tokenizer are made once."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("name", RECIPES)
def test_the_cpu_twin_of_a_recipe_trains_and_exports(name: str, folder: Path) -> None:
    """What a twin cannot show: speed, memory, bf16, Transformer Engine, grouped GEMM, Slurm."""
    result = subprocess.run(
        [sys.executable, "examples/cpu_twin.py", f"examples/{name}", "--output", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.splitlines()[-1] == f"cpu twin of {name}: 2 steps, exported"
