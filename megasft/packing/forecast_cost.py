"""What a document costs a model of which only its Hugging Face configuration is there.

The sizes that decide the cost stand in ``config.json`` under few names, so this reads the file and
needs neither transformers nor the weights. It counts as training does from Megatron's flags
(``training/row_order.cost_of``): experts in every layer, and latent attention as plain attention of
the channels that carry positions, as the conversion writes it into the flags. A gated MLP is taken
for granted: all families that convert have one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.errors import FlagError
from megasft.packing.balance import Cost, cost_of_model

CONFIG: Final = "config.json"
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


def read_cost(folder: Path) -> Cost:
    """Return the cost of a document to the model of a Hugging Face folder.

    Raises:
        FlagError: There is no configuration, or it lacks a size.
    """
    path = folder / CONFIG
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise FlagError(
            f"{path} cannot be read ({error}); name the Hugging Face folder of the model"
        ) from None
    try:
        return cost_of_config(config.get("text_config") or config)
    except KeyError as error:
        raise FlagError(
            f"{path} has no {error.args[0]}, which the cost of a row depends on; name the folder "
            "of a causal language model"
        ) from None


def cost_of_config(config: Mapping[str, Any]) -> Cost:
    """Return the cost of a document to a model with this configuration.

    Raises:
        KeyError: A size is missing; its name.
    """
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    is_latent = config.get("kv_lora_rank") is not None
    channels = config.get("qk_rope_head_dim" if is_latent else "head_dim") or hidden_size // heads
    return cost_of_model(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden_size,
        attention_size=heads * channels,
        key_value_size=(config.get("num_key_value_heads") or heads) * channels,
        mlp_weights=3 * hidden_size * _ffn_size(config),
        vocab_size=config["vocab_size"],
    )


def _ffn_size(config: Mapping[str, Any]) -> int:
    """Return the width of the MLPs that one token meets in a layer."""
    ffn_size = int(config["intermediate_size"])
    if not any(config.get(name) for name in _EXPERTS):
        return ffn_size
    expert_size = int(config.get("moe_intermediate_size") or ffn_size)
    shared_size = int(
        config.get("shared_expert_intermediate_size")
        or (config.get("n_shared_experts") or 0) * expert_size
    )
    return expert_size * int(config["num_experts_per_tok"]) + shared_size
