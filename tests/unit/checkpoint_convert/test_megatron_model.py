"""Megatron's own model, loaded by Megatron's own ``load_checkpoint``, computes what HF's does."""

import json
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron
from tests.megatron.runs import torchrun
from tests.unit.checkpoint_convert.tiny_models import MODELS, make, save

WORKER = "tests.unit.checkpoint_convert.load_worker"
RUN_FLAGS = [
    *("--micro-batch-size", "1", "--global-batch-size", "2", "--seq-length", "16"),
    *("--train-iters", "1", "--lr", "1e-4"),
]
TOKENS = torch.arange(2 * 16).reshape(2, 16).mul(37) % 98
# float32 and logits up to 4: what another order of summation makes of it is 3e-6.
TOLERANCE = 5e-6


def case(name: str, folder: Path, flags: list[str]) -> dict[str, object]:
    checkpoint = folder / name
    if not checkpoint.exists():
        hf_to_megatron.convert(save(name, folder / f"{name}_hf"), checkpoint)
    return {
        "checkpoint": str(checkpoint),
        "flags": [*RUN_FLAGS, *flags],
        "tokens": TOKENS.tolist(),
        "logits": str(folder / "_".join([name, *flags, "logits.pt"])),
    }


def assert_same_logits(name: str, case: dict[str, object]) -> None:
    with torch.no_grad():
        wanted = make(name)(TOKENS).logits
    found = torch.load(str(case["logits"]))
    assert found.shape == wanted.shape == (2, 16, 98)
    assert wanted.std() > 0.5
    assert (found - wanted).abs().max() <= TOLERANCE


@pytest.mark.slow
def test_every_family_computes_the_logits_of_hugging_face(tmp_path: Path) -> None:
    """Tensor names, layer axis, flags and required fields of the checkpoint, all at once.

    Mirrors ``load_checkpoint`` with ``--pretrained-checkpoint`` (Megatron 0.19.2), on the local
    layer spec. The weights are nan before loading, so none can be left out. It does not cover the
    Transformer Engine spec, which needs a GPU; its names are checked in ``test_checkpoint``.
    """
    cases = {name: case(name, tmp_path, []) for name in MODELS}
    (tmp_path / "cases.json").write_text(json.dumps(list(cases.values())))
    torchrun(1, "-m", WORKER, str(tmp_path / "cases.json"))
    for name, each in cases.items():
        assert_same_logits(name, each)


@pytest.mark.slow
def test_one_checkpoint_loads_at_any_layout(tmp_path: Path) -> None:
    """Conversion right at TP 1 and wrong at TP 2 is the complaint about other converters.

    The vocabulary of 98 rows is cut over two ranks without padding, and tied embeddings are on
    both the first and the last pipeline stage.
    """
    layouts = {"tp": ["--tensor-model-parallel-size", "2"]}
    layouts["pp"] = ["--pipeline-model-parallel-size", "2"]
    cases = {
        (name, layout): case(name, tmp_path, flags)
        for name in ("qwen2", "qwen3")
        for layout, flags in layouts.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(list(cases.values())))
    torchrun(2, "-m", WORKER, str(tmp_path / "cases.json"))
    for (name, _), each in cases.items():
        assert_same_logits(name, each)
