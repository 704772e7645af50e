"""Random models of a few thousand parameters, saved as Hugging Face folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# 98 is no multiple of 128: Megatron would pad it. head_dim 16 is not hidden_size / heads = 8.
SIZES = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}


def _llama() -> PreTrainedModel:
    config = LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def _llama_gqa_tied() -> PreTrainedModel:
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def _llama_rope(**rope: Any) -> PreTrainedModel:
    """Llama with scaled rope; Llama 3's base unless the rope says another."""
    parameters = {"rope_theta": 500_000.0} | rope
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, rope_parameters=parameters)
    )


def _mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES | changes, num_key_value_heads=2, head_dim=16))


def _mixtral() -> PreTrainedModel:
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**SIZES | experts, num_key_value_heads=2))


def _qwen2(**changes: Any) -> PreTrainedModel:
    sizes = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def _qwen3(*, is_tied: bool, **rope: Any) -> PreTrainedModel:
    config = Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=is_tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0} | rope,
    )
    return Qwen3ForCausalLM(config)


def _qwen2_moe(**changes: Any) -> PreTrainedModel:
    sizes = SIZES | EXPERTS | {"shared_expert_intermediate_size": 40} | changes
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_key_value_heads=2))


def _qwen3_moe(**changes: Any) -> PreTrainedModel:
    sizes = SIZES | EXPERTS | {"norm_topk_prob": True} | changes
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=16))


def _deepseek_v3(**changes: Any) -> PreTrainedModel:
    sizes = SIZES | LATENT | {"num_key_value_heads": 4, "moe_intermediate_size": 24}
    # Two groups of three leave six experts, of which four are taken: both choices have a say.
    experts = {"n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    # Released configurations say it; transformers keeps it, and would not write it by itself.
    said = {"scoring_func": "sigmoid"}
    config = sizes | experts | said | {"n_shared_experts": 2, "first_k_dense_replace": 0} | changes
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config))


# A window shorter than the rows compared; Qwen's classes have it in some layers.
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# The rows compared are longer than an original context of 8. Rope of Llama 3.1 but for its factor,
# which is 8 there and 8 by default in Megatron.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SHORT = LLAMA3_ROPE | {
    "original_max_position_embeddings": 8,
    "factor": 4.0,
    "rope_theta": 10_000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_slow": 0.05,
}
YARN_IN_FULL = YARN | {
    "attention_factor": 1.3,
    "beta_fast": 0.5,
    "beta_slow": 0.02,
    "truncate": False,
}
# DeepSeek-V3's but for the two scales, which are 1 there and cancel in cos and sin.
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
}
LATENT_YARN_SHORT = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 0.1,
    "beta_slow": 0.005,
}

# The seed is one that leaves every router far from a tie, which test_tiny_models measures.
TOKENS = torch.randint(98, (4, 24), generator=torch.Generator().manual_seed(2))
"""Documents to compare logits on, longer than the windows and the short original contexts."""

TOLERANCE = 5e-6
"""Of the largest logit, in float32: another order of summation was seen to make 1.7e-6 of it."""

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_gqa_tied": _llama_gqa_tied,
    "llama3_rope": lambda: _llama_rope(**LLAMA3_ROPE),
    "llama3_rope_short": lambda: _llama_rope(**LLAMA3_SHORT),
    "llama_linear": lambda: _llama_rope(rope_type="linear", factor=3.0),
    "llama_yarn": lambda: _llama_rope(**YARN_IN_FULL),
    "mistral": lambda: _mistral(sliding_window=None),
    "mistral_window": lambda: _mistral(sliding_window=5),
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_window": lambda: _qwen2(**WINDOW, num_hidden_layers=3),
    "qwen3": lambda: _qwen3(is_tied=False),
    "qwen3_tied": lambda: _qwen3(is_tied=True),
    "qwen3_yarn": lambda: _qwen3(is_tied=False, **YARN),
    "qwen2_moe": _qwen2_moe,
    "qwen2_moe_window": lambda: _qwen2_moe(**WINDOW),
    "qwen2_moe_dense_first": lambda: _qwen2_moe(decoder_sparse_step=2, norm_topk_prob=True),
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe_plain": lambda: _qwen3_moe(norm_topk_prob=False, tie_word_embeddings=True),
    "qwen3_moe_window": lambda: _qwen3_moe(**WINDOW),
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3_yarn": lambda: _deepseek_v3(rope_parameters=LATENT_YARN),
    "deepseek_v3_yarn_short": lambda: _deepseek_v3(rope_parameters=LATENT_YARN_SHORT),
    # Every group is chosen, which is how models without groups are written.
    "deepseek_v3_dense_first": lambda: _deepseek_v3(
        num_hidden_layers=3, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1
    ),
}


def make(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model whose every weight matters, biases and norms included."""
    torch.manual_seed(len(name))
    model = MODELS[name]()
    for weight_name, weight in model.named_parameters():
        is_norm = weight.ndim == 1
        # Routers far from a tie: experts that swap places are no matter of rounding.
        std = 0.6 if weight_name.endswith("mlp.gate.weight") else 0.15
        weight.data.normal_(mean=1.0 if is_norm else 0.0, std=std)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model.to(dtype).eval()


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    make(name, dtype=dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
