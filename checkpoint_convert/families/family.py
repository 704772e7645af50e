"""What a model family is to conversion: its tensors, and what its configuration means.

Megatron's names are those of the Transformer Engine layer spec; the local spec maps its own to them
(``sharded_state_dict_keys_map``, completed by ``megasft.megatron.model``), so one checkpoint serves
both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from checkpoint_convert.families.config import Config
from checkpoint_convert.families.rope import RopeFlags, rope_flags
from checkpoint_convert.families.window import WindowedLayers
from checkpoint_convert.rules import GATED, QKV, WHOLE, Join, Rule

COMMON_FLAGS: Final = (
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--hidden-dropout", "0"),
)

WINDOW_SWITCH: Final[dict[str, tuple[Any, ...]]] = {"use_sliding_window": (False, True, None)}
"""For classes that have it: without it transformers itself drops the window."""


def in_layer(megatron: str, *hf: str, join: Join = WHOLE, is_buffer: bool = False) -> Rule:
    """Return a rule for a tensor of a layer."""
    names = tuple(f"model.layers.{{layer}}.{name}" for name in hf)
    return Rule(f"decoder.layers.{megatron}", names, join, is_buffer=is_buffer)


def gated(megatron: str, hf: str) -> tuple[Rule, Rule]:
    """Return the rules of a gated MLP under a name of each side."""
    return (
        in_layer(
            f"{megatron}.linear_fc1.weight",
            *(f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            join=GATED,
        ),
        in_layer(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight"),
    )


def routed(gate: str, up: str, down: str) -> tuple[Rule, Rule]:
    """Return the rules of routed experts from the names of one expert's tensors.

    Args:
        gate: Name in a layer, with ``{expert}`` for the expert's index.
        up: Likewise.
        down: Likewise.
    """
    return (
        in_layer("mlp.experts.experts.linear_fc1.weight", gate, up, join=GATED),
        in_layer("mlp.experts.experts.linear_fc2.weight", down),
    )


ENDS: Final = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), WHOLE, True),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
)

OUTPUT: Final = Rule("output_layer.weight", ("lm_head.weight",), WHOLE, True)

ATTENTION: Final = (
    in_layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    in_layer(
        "self_attention.linear_qkv.weight",
        *("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        join=QKV,
    ),
    in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)

QKV_BIAS: Final = in_layer(
    "self_attention.linear_qkv.bias",
    *("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    join=QKV,
)

QK_NORM: Final = (
    in_layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    in_layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

ATTENTION_MODULES: Final = ("self_attention.linear_qkv", "self_attention.linear_proj")

QK_NORM_MODULES: Final = (
    *ATTENTION_MODULES,
    *("self_attention.q_layernorm", "self_attention.k_layernorm"),
)

DENSE_MLP: Final = (
    in_layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    *gated("mlp", "mlp"),
)

DENSE_MODULES: Final = ("mlp.linear_fc1", "mlp.linear_fc2")

ROUTED: Final = routed(
    *(f"mlp.experts.{{expert}}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj"))
)

ROUTED_MODULES: Final = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")

DERIVED_TENSORS: Final = (".rotary_emb.inv_freq",)
"""Endings of names in old Hugging Face folders that are computed from the configuration."""


@dataclass(frozen=True, slots=True)
class Experts:
    """What a layer with experts has in the place of a dense MLP.

    Attributes:
        count: Configuration field with the number of routed experts.
        rules: Router, norm and shared experts; routed experts apart.
        modules: Modules of such a layer whose ``_extra_state`` a run asks for, routed ones apart.
        is_sparse: Configuration and layer, counted from 0, to whether the layer has experts.
        routed: Routed experts.
    """

    count: str
    rules: tuple[Rule, ...]
    modules: tuple[str, ...]
    is_sparse: Callable[[Config, int], bool]
    routed: tuple[Rule, ...] = ROUTED


def _no_flags(config: Config, path: Path) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Family:
    """Models that differ in sizes only.

    Attributes:
        architecture: Hugging Face's class; another head on the same body is refused.
        attention: A layer's rules apart from its MLP and experts.
        modules: Modules among these whose ``_extra_state`` a run asks for; without FP8 there is
            nothing in it.
        flags: Megatron's flags that follow from the family alone.
        values: Further configuration fields that are one flag with the same value.
        fixed: Further fields with one value that Megatron's flags can express.
        read: Further fields that ``more_flags`` and ``experts`` read, or that change nothing.
        more_flags: Configuration, and its path for errors, to flags, where it takes more than a
            table.
        stated: Fields the file itself has to have, because what is computed without them is a
            guess; by name, why and what to write.
        rope: How the family's attention scales rope.
        windowed_layers: The layers that a sliding window is for.
        experts: None for a dense model.
    """

    architecture: str
    attention: tuple[Rule, ...] = ATTENTION
    modules: tuple[str, ...] = ATTENTION_MODULES
    flags: tuple[str, ...] = COMMON_FLAGS
    values: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    more_flags: Callable[[Config, Path], list[str]] = _no_flags
    stated: Mapping[str, str] = field(default_factory=dict)
    rope: RopeFlags = rope_flags
    windowed_layers: WindowedLayers = "none"
    experts: Experts | None = None

    def layer_rules(self, *, is_sparse: bool) -> tuple[Rule, ...]:
        """Return what a layer is made of, with experts or without."""
        if self.experts is None or not is_sparse:
            return (*self.attention, *DENSE_MLP)
        return (*self.attention, *self.experts.rules, *self.experts.routed)

    def layer_modules(self, *, is_sparse: bool) -> tuple[str, ...]:
        """Return the stateless modules of a layer, routed experts apart."""
        if self.experts is None or not is_sparse:
            return (*self.modules, *DENSE_MODULES)
        return (*self.modules, *self.experts.modules)
