"""Megatron's own model, loaded by Megatron's own ``load_checkpoint``, computes what HF's does."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

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
    error = (found - wanted).abs().max()
    assert error <= TOLERANCE, f"{case['logits']}: {error:.1e}"


def test_the_routers_of_the_models_compared_are_far_from_a_tie() -> None:
    """Else rounding would choose other experts, and an error of 1 would prove nothing."""
    margins: list[float] = []

    def measure(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        scores_VE = output[0].float()
        if hasattr(router, "e_score_correction_bias"):
            scores_VE = scores_VE.sigmoid() + router.e_score_correction_bias
            if router.num_group > router.topk_group:
                groups = scores_VE.unflatten(1, (router.num_group, -1)).topk(2).values.sum(-1)
                best = groups.sort(descending=True).values
                margins.append(float((best[:, 1] - best[:, 2]).min()))
                chosen = groups >= best[:, 1:2]
                size = scores_VE.shape[1] // router.num_group
                scores_VE = scores_VE.where(chosen.repeat_interleave(size, 1), -torch.inf)
        best = scores_VE.sort(descending=True).values
        margins.append(float((best[:, router.top_k - 1] - best[:, router.top_k]).min()))

    for name in MODELS:
        model = make(name)
        for module_name, module in model.named_modules():
            if module_name.endswith("mlp.gate"):
                module.register_forward_hook(measure)
        with torch.no_grad():
            model(TOKENS)
    assert len(margins) == 2 + (2 + 2 + 1) + 3 * 2 + 3 * 4 + 2
    assert all(100 * TOLERANCE < margin < torch.inf for margin in margins), margins


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        # Megatron's default factor, and a context that is not the one it hard-codes.
        ("llama3_rope", "factor", 8.0),
        ("llama3_rope", "original_max_position_embeddings", 4096),
        ("llama3_rope_short", "original_max_position_embeddings", 16),
        ("llama3_rope_short", "low_freq_factor", 2.0),
        ("llama3_rope_short", "high_freq_factor", 3.0),
        ("llama_linear", "factor", 2.0),
        ("llama_yarn", "original_max_position_embeddings", 16),
        ("llama_yarn", "attention_factor", 1.25),
        ("llama_yarn", "beta_fast", 1.0),
        ("llama_yarn", "truncate", True),
        ("qwen3_yarn", "original_max_position_embeddings", 16),
        ("qwen3_yarn", "attention_factor", 1.0),
        ("qwen3_yarn", "factor", 3.0),
        ("deepseek_v3_yarn", "original_max_position_embeddings", 8192),
        ("deepseek_v3_yarn", "mscale", 0.6),
        ("deepseek_v3_yarn", "mscale_all_dim", 1.0),
        ("deepseek_v3_yarn_short", "original_max_position_embeddings", 64),
        ("deepseek_v3_yarn_short", "beta_fast", 1.0),
        ("deepseek_v3_yarn_short", "beta_slow", 0.02),
        *(("mistral_window", "sliding_window", window) for window in (4, 6)),
        *(("qwen2_window", "sliding_window", window) for window in (4, 6)),
        ("qwen2_window", "layer_types", ["sliding_attention"] * 3),
        *(("qwen2_moe_window", "sliding_window", window) for window in (4, 6)),
        *(("qwen3_moe_window", "sliding_window", window) for window in (4, 6)),
    ],
)
def test_the_models_compared_would_show_a_wrong_rope_or_window(
    name: str, field: str, value: Any
) -> None:
    """Rows are longer than every window and short context, so each field moves the logits."""
    model = make(name)
    config = deepcopy(model.config)
    if hasattr(config, field):
        setattr(config, field, value)
    else:
        config.rope_parameters[field] = value
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        error = (model(TOKENS).logits - other(TOKENS).logits).abs().max()
    assert error > 50 * TOLERANCE


@pytest.mark.slow
def test_every_family_computes_the_logits_of_hugging_face(tmp_path: Path) -> None:
    """Tensor names, axes, flags and required fields of the checkpoint, all at once.

    Mirrors ``load_checkpoint`` with ``--pretrained-checkpoint`` (Megatron 0.19.2), on the local
    layer spec with our attention, as a training run has it. The weights are nan before loading, so
    none can be left out. It does not cover the Transformer Engine spec, which needs a GPU; its
    names are checked in ``test_round_trip``.
    """
    cases = {name: case(name, tmp_path, []) for name in MODELS}
    (tmp_path / "cases.json").write_text(json.dumps(list(cases.values())))
    torchrun(1, "-m", WORKER, str(tmp_path / "cases.json"))
    for name, each in cases.items():
        assert_same_logits(name, each)


TP = ("--tensor-model-parallel-size", "2")
PP = ("--pipeline-model-parallel-size", "2")
EP = ("--expert-model-parallel-size", "2")
LAYOUTS = [
    *(("qwen2", TP), ("qwen3", TP), ("qwen2", PP), ("qwen3", PP)),
    # Scaled rope on a stage without an embedding, and a window in the first stage alone.
    *(("qwen3_yarn", TP), ("llama3_rope", PP), ("llama_yarn", PP), ("qwen2_moe_window", PP)),
    *(("mistral_window", TP), ("mixtral", EP), ("deepseek_v3_yarn_short", PP)),
    *(("qwen2_moe", EP), ("qwen3_moe", EP), ("qwen3_moe_plain", EP)),
    # Megatron refuses experts with tensor parallelism and without sequence parallelism.
    *(("qwen2_moe", (*TP, "--sequence-parallel")), ("qwen3_moe", (*TP, "--sequence-parallel"))),
    *(("deepseek_v3", EP), ("deepseek_v3", PP), ("deepseek_v3_dense_first", EP)),
    *(("qwen2_moe_dense_first", EP), ("qwen2_moe_dense_first", PP)),
]


@pytest.mark.slow
def test_one_checkpoint_loads_at_any_layout(tmp_path: Path) -> None:
    """Conversion right at TP 1 and wrong at TP 2 is the complaint about other converters.

    The vocabulary of 98 rows is cut over two ranks without padding, tied embeddings are on both
    the first and the last pipeline stage, and six or eight experts are on two ranks. A dense and a
    sparse layer are on a stage each. Latent attention with TP is what Megatron's local layers
    cannot do; ``model_config`` refuses it.
    """
    cases = [(name, case(name, tmp_path, list(flags))) for name, flags in LAYOUTS]
    (tmp_path / "cases.json").write_text(json.dumps([each for _, each in cases]))
    torchrun(2, "-m", WORKER, str(tmp_path / "cases.json"))
    for name, each in cases:
        assert_same_logits(name, each)
