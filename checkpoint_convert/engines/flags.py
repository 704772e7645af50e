"""From the configuration that a bridge made to Megatron's flags.

Only what describes the model: a bridge also chooses kernels and layouts, which are the run's
business. What no flag here can say is found by comparing logits, not by a longer table.
"""

import argparse
from typing import Any, Final

from checkpoint_convert.families.config import literal
from checkpoint_convert.families.qwen_moe import MOE_FLAGS
from megasft.errors import ConversionError

NAMES_OF_FIELDS: Final = {"num_experts": "num_moe_experts"}
"""Flags whose field in the configuration has another name."""

MODEL_FLAGS: Final = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_query_groups", "max_position_embeddings", "layernorm_epsilon", "normalization"),
    *("padded_vocab_size", "rotary_base", "rotary_percent", "position_embedding_type"),
    *("add_bias_linear", "add_qkv_bias", "swiglu", "qk_layernorm", "window_size"),
    *("untie_embeddings_and_output_weights", "window_attn_skip_freq", "softmax_type"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_layer_freq"),
    *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_topk_scaling_factor"),
    *("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_scaling_factor"),
    *("mscale", "mscale_all_dim"),
)
"""By the names under which Megatron's parser keeps them."""

ALWAYS: Final = ("--hidden-dropout", "0", "--attention-dropout", "0")


def model_flags(config: Any, parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags that say what differs from the parser's defaults.

    Args:
        config: A bridge's configuration, with the fields of Megatron's ``TransformerConfig``.
        parser: Megatron's.

    Raises:
        ConversionError: A value has no flag.
    """
    flags = list(ALWAYS)
    for name in MODEL_FLAGS:
        value = getattr(config, NAMES_OF_FIELDS.get(name, name), None)
        if value is None or value == parser.get_default(name):
            continue
        action = _action(parser, name, value)
        if action is None:
            raise ConversionError(
                f"the bridge's configuration says {name} = {value!r}, which no flag of Megatron's "
                "says; this model cannot be trained from flags"
            )
        flags.append(action.option_strings[0])
        if action.nargs != 0:
            flags.append(_literal(value))
    if getattr(config, "num_moe_experts", None):
        flags += MOE_FLAGS
    if getattr(config, "moe_router_enable_expert_bias", False):
        flags += ["--moe-router-bias-update-rate", "0"]
    if config.num_query_groups not in (None, config.num_attention_heads):
        flags.append("--group-query-attention")
    return flags


def _action(parser: argparse.ArgumentParser, name: str, value: Any) -> argparse.Action | None:
    """Return the flag that sets a value; of a switch, the one with this constant."""
    for action in parser._actions:
        is_named = action.dest == name and bool(action.option_strings)
        if is_named and (action.nargs != 0 or action.const == value):
            return action
    return None


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, list):
        return f"[{','.join(str(int(item)) for item in value)}]"
    return literal(value) if isinstance(value, int | float) else str(value)
