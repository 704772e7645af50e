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


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))


def _qwen3(*, is_tied: bool) -> PreTrainedModel:
    config = Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=is_tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
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
    config = sizes | experts | {"n_shared_experts": 2, "first_k_dense_replace": 0} | changes
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_gqa_tied": _llama_gqa_tied,
    "qwen2": _qwen2,
    "qwen3": lambda: _qwen3(is_tied=False),
    "qwen3_tied": lambda: _qwen3(is_tied=True),
    "qwen2_moe": _qwen2_moe,
    "qwen2_moe_dense_first": lambda: _qwen2_moe(decoder_sparse_step=2, norm_topk_prob=True),
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe_plain": lambda: _qwen3_moe(norm_topk_prob=False, tie_word_embeddings=True),
    "deepseek_v3": _deepseek_v3,
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
