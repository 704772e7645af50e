"""Run files in a folder of their own, beside a converted checkpoint."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.files import MODEL_FILE
from megasft.launch.run import Run, resolve
from megasft.megatron import cpu

MODEL_FLAGS = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--max-position-embeddings", "512", "--padded-vocab-size", "256", "--swiglu"),
    *("--position-embedding-type", "rope", "--disable-bias-linear"),
)
HF_CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
RUN_YAML = """
launch:
  nproc_per_node: 2
  cpu: true
model:
  hf: converted
data:
  store: [store]
  seq_length: 96
  micro-batch-size: 1
  global_batch_size: 8
optim:
  train_iters: 4
  lr: 1e-3
checkpoint:
  save: ckpt/run
  save_interval: 2
"""


@pytest.fixture(scope="session", autouse=True)
def flags_parsed_quickly() -> None:
    """Building Megatron's parser is 0.3 s of CPU with its help read from sources, and many do."""
    cpu.prepare()  # which sets a variable, once in a process
    cpu.remember_docstrings()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the run."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NODE_RANK", "SLURM_NODEID", "PET_NODE_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / MODEL_FILE).write_text(json.dumps({"flags": list(MODEL_FLAGS)}))
    return tmp_path


@pytest.fixture
def write_run(folder: Path) -> Callable[[str], Path]:
    """Write a run.yaml, RUN_YAML unless told otherwise."""

    def write(text: str = RUN_YAML) -> Path:
        path = folder / "run.yaml"
        path.write_text(textwrap.dedent(text).lstrip("\n"))
        return Path("run.yaml")

    return write


def write_hf(folder: Path, tokenizer: Path | None = None) -> Path:
    """Write what of a Hugging Face folder is read before it is converted."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Write shell programs that stand for others, by name, into ``bin``."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


@pytest.fixture
def resolved(write_run: Callable[[str], Path]) -> Callable[..., Run]:
    """Resolve RUN_YAML with some overrides."""
    return lambda *overrides: resolve(write_run(RUN_YAML), overrides)
