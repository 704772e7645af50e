"""Qwen2-MoE and Qwen3-MoE: routed experts, and in Qwen2 a gated shared one beside them.

Both route in the model's own dtype with a softmax in float32, as Megatron does without
``--moe-router-dtype``; setting that flag would change a bfloat16 model.
"""

from pathlib import Path
from typing import Any, Final

from checkpoint_convert.families.config import Config, not_expressible
from checkpoint_convert.families.family import (
    ATTENTION,
    COMMON_FLAGS,
    QK_NORM,
    QK_NORM_MODULES,
    QKV_BIAS,
    WINDOW_SWITCH,
    Experts,
    Family,
    gated,
    in_layer,
)

MOE_FLAGS: Final = (
    # Side losses are the run's business, and off unless it gives a coefficient. With the type
    # "none" that coefficient alone would have no effect.
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0"),
    *("--moe-token-dispatcher-type", "alltoall"),
)

SHARED_MODULES: Final = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")

ROUTER: Final = (
    in_layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    in_layer("mlp.router.weight", "mlp.gate.weight"),
)

_SHARED: Final = (
    *gated("mlp.shared_experts", "mlp.shared_expert"),
    in_layer("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)

_VALUES: Final = {
    "num_experts": "--num-experts",
    "num_experts_per_tok": "--moe-router-topk",
    "moe_intermediate_size": "--moe-ffn-hidden-size",
}

_READ: Final = frozenset(
    (
        *("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "num_local_experts"),
        *("router_aux_loss_coef", "output_router_logits"),  # of training; the logits ignore them
    )
)


def _is_sparse(config: Config, layer: int) -> bool:
    is_dense = layer in (config["mlp_only_layers"] or ())
    return not is_dense and (layer + 1) % config["decoder_sparse_step"] == 0


def _router_flags(config: Config, path: Path) -> list[str]:
    """Renormalizing the chosen probabilities is a softmax over the chosen logits alone."""
    if not config["norm_topk_prob"]:
        return ["--moe-router-pre-softmax"]
    if config["num_experts_per_tok"] == 1:
        raise not_expressible(
            path, "norm_topk_prob with one expert per token", True, "Megatron does not renormalize"
        )
    return []


QWEN3_MOE: Final = Family(
    "Qwen3MoeForCausalLM",
    (*ATTENTION, *QK_NORM),
    QK_NORM_MODULES,
    flags=(*COMMON_FLAGS, *MOE_FLAGS, "--qk-layernorm"),
    values=_VALUES,
    fixed=WINDOW_SWITCH,
    read=_READ,
    more_flags=_router_flags,
    windowed_layers="all",
    experts=Experts("num_experts", ROUTER, ("pre_mlp_layernorm",), _is_sparse),
)

_SHARED_SIZE: Final = {"shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size"}

_FIXED: Final[dict[str, tuple[Any, ...]]] = {"qkv_bias": (True,)}

QWEN2_MOE: Final = Family(
    "Qwen2MoeForCausalLM",
    (*ATTENTION, QKV_BIAS),
    flags=(*COMMON_FLAGS, *MOE_FLAGS, "--add-qkv-bias", "--moe-shared-expert-gate"),
    values=_VALUES | _SHARED_SIZE,
    fixed=_FIXED | WINDOW_SWITCH,
    read=_READ,
    more_flags=_router_flags,
    windowed_layers="listed",
    experts=Experts(
        "num_experts", (*ROUTER, *_SHARED), ("pre_mlp_layernorm", *SHARED_MODULES), _is_sparse
    ),
)
