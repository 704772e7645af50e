"""The models a proof is run on: small, random, and of the families people fine-tune."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from megasft.proof.layouts import DENSE, MOE
from megasft.proof.samples import VOCAB
from megasft.ranks.layout import Layout

SIZES: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    # Large enough that attention, gates and routers have something to say.
    "initializer_range": 0.2,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A small model of one family.

    Attributes:
        what: What is special about it, for the report.
        build: Makes the Hugging Face model, random by torch's seed.
        layouts: The layouts it is run on.
        rare: Those of ``RARE`` that it is run with.
    """

    what: str
    build: Callable[[], Any]
    layouts: tuple[Layout, ...]
    rare: tuple[str, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether there are softmax routers, whose losses the truth knows."""
        return "router" in self.rare

    def objectives(self, chosen: tuple[str, ...]) -> list[str]:
        """Return those of the chosen objectives that this model is run with."""
        return [name for name in chosen if name not in RARE or name in self.rare]


RARE: Final = ("router", "weights", "normalized")
"""Objectives that mean something for few models, or need not be run on all layouts."""


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 96}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads, tie_word_embeddings=False))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 96}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=True))


MOE_SIZES: Final = {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": False,
}


def _qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MOE_SIZES, **experts))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE_SIZES, **experts, head_dim=16))


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    experts = {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "first_k_dense_replace": 0}
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    sizes = SIZES | MOE_SIZES | {"num_key_value_heads": SIZES["num_attention_heads"]}
    # transformers computes a sigmoid and does not say so when it saves; conversion does not guess.
    said = {"scoring_func": "sigmoid"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **experts, **latent, **heads, **said))


TIED: Final = tuple(
    layout
    for layout in DENSE
    if layout.name in ("1 rank", "TP 2 + SP, mbs 2", "CP 2", "PP 2", "TP 2 + SP x CP 2 x PP 2")
)

FEW_MOE: Final = tuple(
    layout
    for layout in MOE
    if layout.name
    in ("1 rank", "TP 2 + SP", "CP 2 x EP 2", "PP 2", "TP 2 + SP x CP 2 x DP 2 x EP 2")
)

LATENT: Final = tuple(layout for layout in MOE if layout.tp == 1)
"""Megatron's local layers cannot split latent attention over tensor-parallel ranks."""

FAMILIES: Final = {
    "qwen3": Family("dense, grouped-query attention, qk-norm, untied embeddings", _qwen3, DENSE),
    "llama": Family("dense, tied embeddings", _llama, TIED, rare=("weights",)),
    "qwen2_moe": Family(
        "8 experts, 2 chosen, a gated shared expert, biases",
        _qwen2_moe,
        MOE,
        rare=("router", "normalized"),
    ),
    "qwen3_moe": Family(
        "8 experts, 2 chosen and renormalized, qk-norm", _qwen3_moe, FEW_MOE, rare=("router",)
    ),
    "deepseek_v3": Family(
        "latent attention (q/k heads of 24, v of 12), 8 experts in groups, sigmoid router with "
        "bias, shared expert",
        _deepseek_v3,
        LATENT,
    ),
}
"""``megasft prove --model NAME``."""


def build(family: str, *, seed: int) -> Any:
    """Build the Hugging Face model of a family, float32, random.

    Args:
        family: A name of ``FAMILIES``.
        seed: The weights are a function of it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = FAMILIES[family].build()
    if FAMILIES[family].layouts is not DENSE and hasattr(model, "set_experts_implementation"):
        # The library's grouped kernel has no float64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        # Norms of one, biases and expert biases of zero would hide where they are lost.
        for name, vector in (*model.named_parameters(), *model.named_buffers()):
            if vector.dim() == 1 and not name.endswith("inv_freq"):
                vector.add_(0.2 * torch.randn_like(vector))
    return model
