"""From a Hugging Face configuration to Megatron's flags, field by field.

Every field in ``config.json`` is mapped, known not to change what the model computes, or an error
that names it. An unknown field is never skipped: a checkpoint that is right in the tensors and
wrong in the configuration trains without complaint, and to a wrong model.

Values are read through the ``transformers`` installed, which fills in what the file leaves out and
knows both places of the rope base (``rope_theta`` up to release 4, ``rope_parameters`` since 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from checkpoint_convert.families import (
    ENDS,
    FAMILIES,
    OUTPUT,
    REFUSED_FAMILIES,
    Family,
    literal,
    not_expressible,
    read_rope,
    window_flags,
)
from checkpoint_convert.rules import Heads, Rule
from megasft.errors import ConversionError

VALUE_FLAGS: Final = {
    "num_hidden_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "intermediate_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "max_position_embeddings": "--max-position-embeddings",
    "rms_norm_eps": "--norm-epsilon",
    "attention_dropout": "--attention-dropout",
    # The model has exactly the rows Hugging Face's has. Padded rows would have logits of their own
    # in every softmax, so Megatron's default padding to 128 x TP changes the loss.
    "vocab_size": "--padded-vocab-size",
}
"""Fields that are one flag with the same value."""

FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}
"""Fields with one value that Megatron's flags for these families can express."""

READ_ELSEWHERE: Final = frozenset(
    (
        *("model_type", "architectures", "tie_word_embeddings", "dtype", "torch_dtype"),
        *("head_dim", "num_key_value_heads", "layer_types", "sliding_window"),
        *("rope_parameters", "rope_theta", "rope_scaling"),
    )
)
"""Fields that take more than a table to check."""

WITHOUT_EFFECT: Final = frozenset(
    (
        *("_name_or_path", "transformers_version", "tokenizer_class", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
        *("use_cache", "pretraining_tp", "max_window_layers", "is_encoder_decoder"),
        *("output_hidden_states", "output_attentions", "return_dict", "torchscript"),
        *("id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
        *("_attn_implementation_autoset", "attn_implementation"),
    )
)
"""Fields that do not change the logits; ``max_window_layers`` only through ``layer_types``, which
transformers derives from it."""


@dataclass(frozen=True, slots=True)
class Model:
    """What conversion needs to know about a model.

    Attributes:
        hf_config: The content of ``config.json``, untouched.
        flags: Megatron's flags, as they stand on a command line.
        dtype: What the configuration says the weights are saved in; None when it does not.
        num_experts: Routed experts of a layer that has any; 0 for a dense model.
        is_sparse: Which layers have experts; empty for a dense model.
    """

    family_name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    heads: Heads
    is_tied: bool
    dtype: torch.dtype | None
    flags: tuple[str, ...]
    hf_config: dict[str, Any]
    num_experts: int = 0
    is_sparse: tuple[bool, ...] = ()

    @property
    def has_layer_axis(self) -> bool:
        """Whether layers are alike, so that Megatron keeps one tensor for all layers."""
        return len(set(self.is_sparse)) < 2

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Every tensor of this model; with tied embeddings there is no output layer."""
        family = FAMILIES[self.family_name]
        if self.has_layer_axis:
            layers = family.layer_rules(is_sparse=any(self.is_sparse))
        else:
            kinds = [family.layer_rules(is_sparse=is_sparse) for is_sparse in self.is_sparse]
            layers = tuple(rule.at(i) for i, kind in enumerate(kinds) for rule in kind)
        return (*ENDS, *layers, *(() if self.is_tied else (OUTPUT,)))


def read_model(folder: Path) -> Model:
    """Read ``config.json`` and map all of it.

    Raises:
        ConversionError: There is none, or it says something Megatron's flags cannot.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} {_what_is_missing(folder)}")
    written: dict[str, Any] = orjson.loads(path.read_bytes())
    family = _family(written, path)
    _require_known(written, family, path)
    return _map(written, _with_defaults(folder), family, path)


def _what_is_missing(folder: Path) -> str:
    """Say what to give instead of a folder without ``config.json``."""
    if folder.is_dir():
        return "has no config.json; give a Hugging Face model folder"
    if folder.is_absolute() or len(folder.parts) != 2 or folder.parent.exists():
        return "is not there; give a Hugging Face model folder"
    return (
        "is not a folder here; if it is a model of huggingface.co, fetch it first: hf download "
        f"{folder} --local-dir {folder.name}, and give {folder.name}"
    )


def _with_defaults(folder: Path) -> dict[str, Any]:
    """Return the configuration as transformers understands it."""
    # Imported here: conversion from Python should not pay for it before it is needed.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        effective: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"{folder / 'config.json'} is not what transformers expects: {reason}; mend the field"
        ) from error
    if "num_local_experts" in effective:  # what release 5 calls num_experts in some classes
        effective.setdefault("num_experts", effective["num_local_experts"])
    return effective


def _family(config: Mapping[str, Any], path: Path) -> Family:
    name = config.get("model_type")
    if name in REFUSED_FAMILIES:
        raise ConversionError(
            f"{path}: model_type is {name!r}, which Megatron-Core 0.19 cannot compute. It lacks "
            f"{REFUSED_FAMILIES[name]}. Families that convert: {', '.join(FAMILIES)}"
        )
    if name not in FAMILIES:
        raise ConversionError(
            f"{path}: model_type is {name!r}; families that convert: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    if (config.get("architectures") or [family.architecture]) != [family.architecture]:
        raise ConversionError(
            f"{path}: architectures is {config['architectures']}, and only {family.architecture} "
            "converts; save the causal language model"
        )
    return family


def _require_known(written: Mapping[str, Any], family: Family, path: Path) -> None:
    if written.get("quantization_config") is not None:
        raise ConversionError(
            f"{path}: quantization_config is {written['quantization_config']!r}, and conversion "
            "reads plain weights only; make a bfloat16 copy (for DeepSeek's fp8 weights with the "
            "fp8_cast_bf16.py of the DeepSeek-V3 repository), and remove the field from its "
            "config.json"
        )
    for name, why in family.stated.items():
        if written.get(name) is None:
            raise ConversionError(f"{path} has no {name}, and conversion does not guess: {why}")
    known = VALUE_FLAGS.keys() | FIXED.keys() | READ_ELSEWHERE | WITHOUT_EFFECT
    known |= {"quantization_config"} | family.values.keys() | family.fixed.keys() | family.read
    unknown = [f"{name} = {value!r}" for name, value in written.items() if name not in known]
    if unknown:
        raise ConversionError(
            f"{path} has fields this release cannot translate: {'; '.join(unknown)}. If they do "
            "not change what the model computes, remove them from the file; if they do, the model "
            "cannot be converted"
        )


def _map(
    written: dict[str, Any], effective: Mapping[str, Any], family: Family, path: Path
) -> Model:
    for name, allowed in (FIXED | dict(family.fixed)).items():
        value = effective.get(name, allowed[0])
        if value not in allowed:
            raise not_expressible(path, name, value, f"only {allowed[0]!r} converts")
    heads = Heads(
        num_heads=int(effective["num_attention_heads"]),
        num_groups=int(effective.get("num_key_value_heads") or effective["num_attention_heads"]),
        head_dim=int(
            effective.get("head_dim")
            or effective["hidden_size"] // effective["num_attention_heads"]
        ),
    )
    is_tied = bool(effective["tie_word_embeddings"])
    more_flags = family.more_flags(effective, path)
    flags: list[str] = []
    for name, flag in (VALUE_FLAGS | dict(family.values)).items():
        if effective[name] is None:
            raise not_expressible(path, name, None, "the family needs a number")
        flags += [flag, literal(effective[name])]
    flags += ["--kv-channels", str(heads.head_dim)]
    if heads.num_groups != heads.num_heads:
        flags += ["--group-query-attention", "--num-query-groups", str(heads.num_groups)]
    rope = read_rope(effective, path)
    flags += ["--rotary-base", str(rope.base), *family.rope(rope, path)]
    flags += window_flags(effective, family.windowed_layers, path)
    is_sparse = _sparse_layers(effective, family, path)
    if len(set(is_sparse)) == 2:
        pattern = ",".join(str(int(layer)) for layer in is_sparse)
        flags += ["--moe-layer-freq", f"[{pattern}]"]
    flags += [*family.flags, *more_flags]
    if not is_tied:
        flags.append("--untie-embeddings-and-output-weights")
    return Model(
        family_name=str(written["model_type"]),
        num_layers=int(effective["num_hidden_layers"]),
        hidden_size=int(effective["hidden_size"]),
        vocab_size=int(effective["vocab_size"]),
        heads=heads,
        is_tied=is_tied,
        dtype=_dtype(written, path),
        flags=tuple(flags),
        hf_config=written,
        num_experts=int(effective[family.experts.count]) if family.experts else 0,
        is_sparse=is_sparse,
    )


def _sparse_layers(effective: Mapping[str, Any], family: Family, path: Path) -> tuple[bool, ...]:
    """Return which layers have experts; nothing for a dense model."""
    if family.experts is None:
        return ()
    layers = range(effective["num_hidden_layers"])
    is_sparse = tuple(family.experts.is_sparse(effective, layer) for layer in layers)
    if not any(is_sparse) or not effective[family.experts.count]:
        raise not_expressible(
            path, family.experts.count, effective[family.experts.count], "no layer has experts"
        )
    return is_sparse


def _dtype(written: Mapping[str, Any], path: Path) -> torch.dtype | None:
    name = written.get("dtype", written.get("torch_dtype"))
    return None if name is None else parse_dtype(str(name), source=str(path))


def parse_dtype(name: str, *, source: str) -> torch.dtype:
    """Return the torch dtype a configuration or a user names.

    Raises:
        ConversionError: It is not a floating-point dtype.

    Example:
        >>> parse_dtype("bfloat16", source="--dtype")
        torch.bfloat16
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"{source}: dtype {name!r} is none; use bfloat16, float16 or float32")
    return dtype
