"""Llama, Mistral, Qwen2 and Qwen3: every layer is attention and one gated MLP."""

from typing import Final

from checkpoint_convert.families.family import (
    ATTENTION,
    COMMON_FLAGS,
    QK_NORM,
    QK_NORM_MODULES,
    QKV_BIAS,
    WINDOW_SWITCH,
    Family,
)

LLAMA: Final = Family("LlamaForCausalLM")

MISTRAL: Final = Family("MistralForCausalLM", windowed_layers="all")

QWEN2: Final = Family(
    "Qwen2ForCausalLM",
    (*ATTENTION, QKV_BIAS),
    flags=(*COMMON_FLAGS, "--add-qkv-bias"),
    fixed=WINDOW_SWITCH,
    windowed_layers="listed",
)

QWEN3: Final = Family(
    "Qwen3ForCausalLM",
    (*ATTENTION, *QK_NORM),
    QK_NORM_MODULES,
    flags=(*COMMON_FLAGS, "--qk-layernorm"),
    fixed=WINDOW_SWITCH,
    windowed_layers="listed",
)
