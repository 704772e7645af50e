"""DeepSeek-V3: latent attention, sigmoid router with a bias per expert, shared experts.

Refused: queries without a latent (``q_lora_rank`` null), where Megatron 0.19 has no way to norm the
keys' latent and leave the query alone (``QKNormConfigResolver``).
"""

from pathlib import Path
from typing import Any, Final

from checkpoint_convert.families.config import Config, not_expressible
from checkpoint_convert.families.family import COMMON_FLAGS, Experts, Family, gated, in_layer
from checkpoint_convert.families.qwen_moe import MOE_FLAGS, ROUTER, SHARED_MODULES
from checkpoint_convert.families.rope import latent_rope_flags

_ATTENTION: Final = (
    in_layer("input_layernorm.weight", "input_layernorm.weight"),
    in_layer("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight"),
    in_layer("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight"),
    in_layer("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight"),
    in_layer("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    in_layer(
        "self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight"
    ),
    in_layer("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight"),
    in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)

_MODULES: Final = (
    *("input_layernorm", "self_attention.linear_proj"),
    *("self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj"),
    *("self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj"),
)

_EXPERTS: Final = Experts(
    "n_routed_experts",
    (
        *ROUTER,
        in_layer("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", is_buffer=True),
        *gated("mlp.shared_experts", "mlp.shared_experts"),
    ),
    ("pre_mlp_layernorm", *SHARED_MODULES),
    lambda config, layer: bool(layer >= config["first_k_dense_replace"]),
)

_VALUES: Final = {
    "n_routed_experts": "--num-experts",
    "num_experts_per_tok": "--moe-router-topk",
    "moe_intermediate_size": "--moe-ffn-hidden-size",
    "routed_scaling_factor": "--moe-router-topk-scaling-factor",
    "kv_lora_rank": "--kv-lora-rank",
    "qk_nope_head_dim": "--qk-head-dim",
    "qk_rope_head_dim": "--qk-pos-emb-head-dim",
    "v_head_dim": "--v-head-dim",
}

_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    # Hugging Face norms the latents with this epsilon whatever the field says, Megatron with the
    # field's.
    "rms_norm_eps": (1e-6,),
    "norm_topk_prob": (True,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    # May be absent, unlike scoring_func: it is the one method with a bias per expert, and a folder
    # without the biases is refused for them.
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}

_STATED: Final = {
    "scoring_func": (
        "transformers leaves it out when it saves this family, its own class computes a sigmoid, "
        'and other programs then take a softmax; add "scoring_func": "sigmoid" to the file if the '
        "model was trained as transformers computes it"
    )
}

_READ: Final = frozenset(
    (
        *("q_lora_rank", "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group"),
        *("qk_head_dim", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size"),
        # Layers that the class does not build. When a folder holds their tensors, these are refused
        # as tensors that no rule takes.
        *("num_nextn_predict_layers", "num_mtp_layers"),
        "auto_map",  # code beside the released weights, which transformers' class has replaced
    )
)

_FLAGS: Final = (
    *COMMON_FLAGS,
    *MOE_FLAGS,
    *("--multi-latent-attention", "--qk-layernorm", "--moe-router-score-function", "sigmoid"),
    # Hugging Face has no rule to update the bias: a run that wants Megatron's gives its rate.
    *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "0"),
    *("--moe-router-dtype", "fp32"),
)


def _more_flags(config: Config, path: Path) -> list[str]:
    """Latent of the query, groups of experts, and shared experts as one MLP of their joint size."""
    if config["q_lora_rank"] is None:
        raise not_expressible(
            path, "q_lora_rank", None, "Megatron norms the query then, or not the keys' latent"
        )
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise not_expressible(
            path,
            "num_key_value_heads",
            config["num_key_value_heads"],
            f"of latent attention's {config['num_attention_heads']} heads each has its own",
        )
    if not config["n_shared_experts"] or config["n_shared_experts"] < 1:
        raise not_expressible(path, "n_shared_experts", config["n_shared_experts"], "one is needed")
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    return [
        *("--q-lora-rank", str(config["q_lora_rank"])),
        *("--moe-shared-expert-intermediate-size", str(shared)),
        *_group_flags(config, path),
    ]


def _group_flags(config: Config, path: Path) -> list[str]:
    """Hugging Face judges a group by its two best experts, Megatron by its ``topk / groups``."""
    top_k, groups, chosen = (
        config[name] for name in ("num_experts_per_tok", "n_group", "topk_group")
    )
    if top_k is None or top_k < 2:
        raise not_expressible(
            path, "num_experts_per_tok", top_k, "Megatron does not renormalize a single one"
        )
    if groups is None or chosen is None:
        raise not_expressible(path, "n_group, topk_group", (groups, chosen), "numbers are needed")
    if groups == chosen:  # every group is chosen
        return []
    if top_k != 2 * chosen:
        raise not_expressible(
            path,
            "num_experts_per_tok with topk_group",
            (top_k, chosen),
            f"Megatron judges a group by its {top_k} // {chosen} best experts, Hugging Face by 2,",
        )
    return ["--moe-router-num-groups", str(groups), "--moe-router-group-topk", str(chosen)]


DEEPSEEK_V3: Final = Family(
    "DeepseekV3ForCausalLM",
    _ATTENTION,
    _MODULES,
    _FLAGS,
    values=_VALUES,
    fixed=_FIXED,
    read=_READ,
    more_flags=_more_flags,
    stated=_STATED,
    rope=latent_rope_flags,
    experts=_EXPERTS,
)
