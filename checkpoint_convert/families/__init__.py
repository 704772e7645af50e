"""Which model families can be converted: one file each, of tensor names and Megatron's flags.

A family is added by a file here, a line below and a case in ``tests/unit/checkpoint_convert``; a
new kind of tensor by a ``Join`` in ``rules``.
"""

from checkpoint_convert.families.config import literal, not_expressible
from checkpoint_convert.families.deepseek import DEEPSEEK_V3
from checkpoint_convert.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from checkpoint_convert.families.family import (
    DERIVED_TENSORS,
    ENDS,
    OUTPUT,
    ROUTED_MODULES,
    Family,
)
from checkpoint_convert.families.mixtral import MIXTRAL
from checkpoint_convert.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from checkpoint_convert.families.refused import REFUSED_FAMILIES
from checkpoint_convert.families.rope import read_rope
from checkpoint_convert.families.window import window_flags

__all__ = [
    "DERIVED_TENSORS",
    "ENDS",
    "FAMILIES",
    "OUTPUT",
    "REFUSED_FAMILIES",
    "ROUTED_MODULES",
    "Family",
    "literal",
    "not_expressible",
    "read_rope",
    "window_flags",
]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v3": DEEPSEEK_V3,
}
"""By Hugging Face's ``model_type``."""
