import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
def test_counts_are_those_of_the_models_that_are_built(tmp_path: Path) -> None:
    """Memory and checkpoint sizes follow from them; all families, each stage, TP, EP, ETP and MTP.

    Not covered: Transformer Engine's layers, whose parameters have the same sizes.
    """
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.checks.run.parameters_worker", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads((tmp_path / "counts.json").read_text())

    assert {one["model"] for one in seen} >= {"plain GPT", "llama", "qwen3_moe", "deepseek_v3"}
    assert any(one["built"][1] for one in seen)
    assert [one["built"] for one in seen] == [one["counted"] for one in seen]
    on_one_rank = [one for one in seen if one["layout"][1] == "1" and one["layout"][3] == "1"]
    assert len(on_one_rank) == 6
    assert [sum(one["built"]) for one in on_one_rank] == [one["whole"] for one in on_one_rank]
