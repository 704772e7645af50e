"""The tiny models are fit to compare: no router near a tie, no rope or window without effect."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.unit.checkpoint_convert.tiny_models import MODELS, TOKENS, TOLERANCE, make


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
    assert all(20 * TOLERANCE < margin < torch.inf for margin in margins), margins


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
        logits = model(TOKENS).logits
        error = (logits - other(TOKENS).logits).abs().max()
    assert error > 10 * TOLERANCE * logits.abs().max()
