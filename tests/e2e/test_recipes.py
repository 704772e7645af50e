"""Every recipe's CPU twin: its own run.yaml, a tiny model of its family, four ranks, two steps.

One goes the whole road as its reader does. The others train what their files come to on ranks that
are forked, because starting programs is what costs here; they differ in flags alone.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.megatron.runs import ROOT, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.long]

WHOLE_ROAD = "qwen3_30b_a3b"


@pytest.fixture(scope="module")
def cpu_twin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_twin", ROOT / "examples" / "cpu_twin.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program made and said: data, tokenizer, stores and a trained model."""
    folder = tmp_path_factory.mktemp("twins")
    result = subprocess.run(
        [sys.executable, "examples/cpu_twin.py", f"examples/{WHOLE_ROAD}", "--output", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.splitlines()[-1] == f"cpu twin of {WHOLE_ROAD}: 2 steps, exported"
    return folder


def test_a_twin_goes_the_whole_road_and_comes_back_as_a_hugging_face_model(folder: Path) -> None:
    """What a twin cannot show: speed, memory, bf16, Transformer Engine, grouped GEMM, Slurm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / WHOLE_ROAD / "trained-hf")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.num_experts == 8


@pytest.mark.parametrize("name", ["qwen3_8b", "llama31_70b", "long_context_128k"])
def test_what_a_recipe_comes_to_on_a_cpu_trains(
    name: str, folder: Path, cpu_twin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoint_convert.hf_to_megatron import convert
    from megasft.launch.run import resolve

    recipe, run_dir = ROOT / "examples" / name, folder / name
    changes = yaml.safe_load((recipe / "cpu.yaml").read_text())
    cpu_twin.make_model(changes.pop("family"), folder / "tokenizer", output=run_dir / "hf")
    for store in ("store", "valid-store"):
        shutil.copytree(folder / WHOLE_ROAD / store, run_dir / store)
    monkeypatch.setenv("HF_DIR", str(run_dir / "hf"))
    monkeypatch.setenv("RUN_DIR", str(run_dir))

    run = resolve(recipe / "run.yaml", cpu_twin.overrides(changes))
    assert run.converted is not None and run.save is not None
    convert(run_dir / "hf", run.converted)
    torchrun(run.launch.nproc_per_node, "-m", "megasft.pretrain_sft", *run.argv)

    steps = map(json.loads, (run.save / "log" / "steps.jsonl").read_text().splitlines())
    assert [step["steps"] for step in steps if "loss" in step] == [1, 2]
    assert json.loads((run.save / "complete.json").read_text()) == {"iteration": 2}
    assert (run.save / "best.json").exists()
