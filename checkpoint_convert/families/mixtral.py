"""Mixtral: Mistral's attention, and eight routed experts in every layer.

On disk experts have names of their own (``block_sparse_moe``; ``w1`` is the gate, ``w3`` up, ``w2``
down), which transformers 5 writes too, though it keeps other ones in memory.
"""

from pathlib import Path
from typing import Any, Final

from checkpoint_convert.families.config import Config, literal, not_expressible
from checkpoint_convert.families.family import COMMON_FLAGS, Experts, Family, in_layer, routed
from checkpoint_convert.families.qwen_moe import MOE_FLAGS

_EXPERTS: Final = Experts(
    "num_local_experts",
    (
        in_layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        in_layer("mlp.router.weight", "block_sparse_moe.gate.weight"),
    ),
    ("pre_mlp_layernorm",),
    lambda config, layer: True,
    routed(*(f"block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3", "w2"))),
)

_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "router_jitter_noise": (0.0, None),  # noise in training, of which Megatron's is another kind
}


def _expert_flags(config: Config, path: Path) -> list[str]:
    """All MLPs are experts, so their size is ``intermediate_size``."""
    if config["num_experts_per_tok"] < 2:
        raise not_expressible(
            path,
            "num_experts_per_tok",
            config["num_experts_per_tok"],
            "Megatron does not renormalize a single one",
        )
    return ["--moe-ffn-hidden-size", literal(config["intermediate_size"])]


MIXTRAL: Final = Family(
    "MixtralForCausalLM",
    flags=(*COMMON_FLAGS, *MOE_FLAGS),
    values={"num_local_experts": "--num-experts", "num_experts_per_tok": "--moe-router-topk"},
    fixed=_FIXED,
    read=frozenset(("router_aux_loss_coef", "output_router_logits")),  # of training
    more_flags=_expert_flags,
    experts=_EXPERTS,
    windowed_layers="all",
)
