"""Random models of a few thousand parameters, saved as Hugging Face folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_gqa_tied": _llama_gqa_tied,
    "qwen2": _qwen2,
    "qwen3": lambda: _qwen3(is_tied=False),
    "qwen3_tied": lambda: _qwen3(is_tied=True),
}


def make(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model whose every weight matters, biases and norms included."""
    torch.manual_seed(len(name))
    model = MODELS[name]()
    for weight in model.parameters():
        is_norm = weight.ndim == 1
        weight.data.normal_(mean=1.0 if is_norm else 0.0, std=0.15)
    return model.to(dtype).eval()


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    make(name, dtype=dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
