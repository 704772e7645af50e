"""The models a proof is run on: small, random, and of the families people fine-tune."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from megasft.proof.layouts import DENSE, Layout
from megasft.proof.samples import VOCAB

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
        has_experts: Whether there are routers with losses of their own.
    """

    what: str
    build: Callable[[], Any]
    layouts: tuple[Layout, ...]
    has_experts: bool = False

    def objectives(self, chosen: tuple[str, ...]) -> list[str]:
        """Return those of the chosen objectives that mean something for this model."""
        return [name for name in chosen if self.has_experts or name != "router"]


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 96}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads, tie_word_embeddings=False))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 96}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, tie_word_embeddings=True))


TIED: Final = tuple(
    layout
    for layout in DENSE
    if layout.name in ("1 rank", "TP 2 + SP, mbs 2", "CP 2", "PP 2", "TP 2 + SP x CP 2 x PP 2")
)

FAMILIES: Final = {
    "qwen3": Family("dense, grouped-query attention, qk-norm, untied embeddings", _qwen3, DENSE),
    "llama": Family("dense, tied embeddings", _llama, TIED),
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
    return FAMILIES[family].build()
