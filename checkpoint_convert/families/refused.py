"""Families that people ask for and Megatron-Core 0.19 cannot compute, each with what it lacks.

A family missing in both tables may be a line of work; these are not: ``GPTModel`` would have to
change. The reasons were read from its source (``TransformerLayer``, ``GPTModel``, the attention
backends), and are shown in the error.
"""

from typing import Final

_GEMMA: Final = (
    "embeddings scaled by the square root of the hidden size, and an MLP gated by the tanh form of "
    "GELU"
)
_FOUR_NORMS: Final = "norms behind attention and behind the MLP (four a layer, Megatron has two)"
_GEMMA_3: Final = (
    f"a rope base of their own for layers with a window (GPTModel has one), {_FOUR_NORMS}, {_GEMMA}"
)

REFUSED_FAMILIES: Final[dict[str, str]] = {
    "gemma": _GEMMA,
    "gemma2": f"soft-capping of attention scores and of the logits, {_FOUR_NORMS}, {_GEMMA}",
    "gemma3": _GEMMA_3,
    "gemma3_text": _GEMMA_3,
}
"""By Hugging Face's ``model_type``: what Megatron-Core 0.19's ``GPTModel`` and its flags lack."""
