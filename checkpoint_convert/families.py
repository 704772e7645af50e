"""Which model families can be converted, as one table: names of tensors and Megatron's flags.

Megatron's names are those of the Transformer Engine layer spec; the local spec maps its own to them
(``sharded_state_dict_keys_map``), so one checkpoint serves both. A family is added by a line here
and a case in ``tests/unit/checkpoint_convert``; a new kind of tensor by a ``Join`` in ``rules``.
"""

from dataclasses import dataclass
from typing import Final

from checkpoint_convert.rules import GATED, QKV, WHOLE, Join, Rule


def _in_layer(megatron: str, *hf: str, join: Join = WHOLE) -> Rule:
    return Rule(
        f"decoder.layers.{megatron}", tuple(f"model.layers.{{layer}}.{name}" for name in hf), join
    )


_ENDS: Final = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), WHOLE, True),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
)

_OUTPUT: Final = Rule("output_layer.weight", ("lm_head.weight",), WHOLE, True)

_LAYER: Final = (
    _in_layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _in_layer(
        "self_attention.linear_qkv.weight",
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        join=QKV,
    ),
    _in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _in_layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _in_layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", join=GATED),
    _in_layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

_QKV_BIAS: Final = _in_layer(
    "self_attention.linear_qkv.bias",
    *("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    join=QKV,
)

_QK_NORM: Final = (
    _in_layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _in_layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

STATELESS_MODULES: Final = (
    *("self_attention.linear_qkv", "self_attention.linear_proj"),
    *("self_attention.q_layernorm", "self_attention.k_layernorm"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Modules of a layer whose ``_extra_state`` a run asks for; without FP8 there is nothing in it."""

DERIVED_TENSORS: Final = (".rotary_emb.inv_freq",)
"""Endings of names in old Hugging Face folders that are computed from the configuration."""

COMMON_FLAGS: Final = (
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--hidden-dropout", "0"),
)


@dataclass(frozen=True, slots=True)
class Family:
    """Models that differ in sizes only.

    Attributes:
        architecture: Hugging Face's class; another head on the same body is refused.
        layer_rules: What a layer is made of.
        flags: Megatron's flags that follow from the family alone.
    """

    architecture: str
    layer_rules: tuple[Rule, ...]
    flags: tuple[str, ...] = COMMON_FLAGS

    def rules(self, *, is_tied: bool) -> tuple[Rule, ...]:
        """Return every tensor's rule; with tied embeddings there is no output layer."""
        return (*_ENDS, *self.layer_rules, *(() if is_tied else (_OUTPUT,)))


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LAYER),
    "qwen2": Family("Qwen2ForCausalLM", (*_LAYER, _QKV_BIAS), (*COMMON_FLAGS, "--add-qkv-bias")),
    "qwen3": Family("Qwen3ForCausalLM", (*_LAYER, *_QK_NORM), (*COMMON_FLAGS, "--qk-layernorm")),
}
"""By Hugging Face's ``model_type``."""
