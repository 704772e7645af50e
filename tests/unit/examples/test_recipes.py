"""Each recipe comes to flags that Megatron's own parser accepts, at the size of its model."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megasft.launch.backends import print_run
from megasft.launch.run import Run, resolve

ROOT = Path(__file__).parents[3]
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN: dict[str, Any] = HEADS | {"vocab_size": 151_936, "max_position_embeddings": 40_960}
LLAMA: dict[str, Any] = HEADS | {"vocab_size": 128_256, "rope_parameters": LLAMA_ROPE}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_8b": (
        "qwen3",
        QWEN | {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36},
    ),
    "qwen3_30b_a3b": (
        "qwen3_moe",
        QWEN
        | {"hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "llama31_70b": (
        "llama",
        LLAMA
        | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "max_position_embeddings": 131_072},
    ),
    "long_context_128k": (
        "llama",
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
        | {"max_position_embeddings": 131_072},
    ),
}


@pytest.fixture
def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    from transformers import AutoConfig

    family, sizes = MODELS[name]
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **sizes)
    config.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DIR", "model")
    monkeypatch.setenv("NODE_RANK", "0")
    return resolve(ROOT / "examples" / name / "run.yaml", ())


def sizes_of(run: Run) -> dict[str, int]:
    words = run.argv
    names = ("tensor", "context", "pipeline", "expert")
    flags = {
        name: f"--{name}{'' if name == 'context' else '-model'}-parallel-size" for name in names
    }
    return {n: int(words[words.index(f) + 1]) if f in words else 1 for n, f in flags.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_prints_a_command_for_the_machines_it_names(
    name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    print_run(run, {})
    text = capsys.readouterr().out
    launch, split = run.launch, sizes_of(run)
    ranks = launch.nnodes * launch.nproc_per_node
    assert ranks % (split["tensor"] * split["context"] * split["pipeline"]) == 0
    assert "-m megasft.pretrain_sft" in text and "--calculate-per-token-loss" in text
    if name == "llama31_70b":
        assert "#SBATCH --nodes=4" in text

    readme = (ROOT / "examples" / name / "README.md").read_text()
    (stated,) = re.findall(r"^(\d+) x 80 GB", readme, re.MULTILINE)
    assert int(stated) == ranks
    script = (ROOT / "examples" / name / "1_data.sh").read_text()
    (planned,) = re.findall(r"--seq-length (\d+)", script)
    assert run.argv[run.argv.index("--seq-length") + 1] == planned
    for flag, axis in (("--tp", "tensor"), ("--cp", "context"), ("--pp", "pipeline")):
        given = re.search(rf"{flag} (\d+)", script)
        assert int(given[1] if given else 1) == split[axis]


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*/*.sh")), ids=str)
def test_the_scripts_of_recipes_are_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
