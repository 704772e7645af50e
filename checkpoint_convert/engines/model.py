"""What a verification needs to know of a model that a bridge converted: sizes and flags, no rules.

Tensors are compared by rules, and there are none; what such a checkpoint computes is compared all
the same.
"""

from pathlib import Path
from typing import Any

import orjson

from checkpoint_convert.config_map import Model
from checkpoint_convert.rules import Heads
from megasft.files import MODEL_FILE

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def engine_of(checkpoint: Path) -> str | None:
    """Return the bridge that made a checkpoint; None when our own rules did, or training."""
    path = checkpoint / MODEL_FILE
    engine = orjson.loads(path.read_bytes()).get("engine") if path.is_file() else None
    return None if engine is None else str(engine)


def described(hf: Path, checkpoint: Path) -> Model:
    """Describe a model by transformers' configuration and the flags a bridge wrote.

    Args:
        hf: The Hugging Face folder.
        checkpoint: With the flags file.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(hf)
    written = orjson.loads((checkpoint / MODEL_FILE).read_bytes())
    num_heads = int(config.num_attention_heads)
    counts = [getattr(config, name, None) for name in EXPERT_COUNTS]
    return Model(
        family_name=str(config.model_type),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        heads=Heads(
            num_heads=num_heads,
            num_groups=int(getattr(config, "num_key_value_heads", None) or num_heads),
            head_dim=int(getattr(config, "head_dim", None) or int(config.hidden_size) // num_heads),
        ),
        is_tied=bool(config.tie_word_embeddings),
        dtype=None,
        flags=tuple(written["flags"]),
        hf_config=orjson.loads((hf / "config.json").read_bytes()),
        num_experts=next((int(count) for count in counts if count), 0),
    )
