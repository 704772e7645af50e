"""All tensors of a model, from one side to the other: nothing missing, nothing left over."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from checkpoint_convert.config_map import Model
from checkpoint_convert.families import DERIVED_TENSORS
from checkpoint_convert.fused_experts import taken_apart
from checkpoint_convert.rules import Rule, merged, same_bits, split
from megasft.errors import ConversionError


class PlacedTensor(NamedTuple):
    """A Megatron tensor and where it lies.

    Attributes:
        key: Name in the checkpoint.
        layer: Its place on the layer axis; None for tensors that are not per layer.
        data: Without the layer axis.
    """

    key: str
    layer: int | None
    data: torch.Tensor


def to_megatron(
    tensors: Mapping[str, torch.Tensor], model: Model, *, verify: bool
) -> list[PlacedTensor]:
    """Map a Hugging Face model's tensors to Megatron's.

    Args:
        tensors: By Hugging Face name.
        model: Sizes and rules.
        verify: Map every tensor back and compare bitwise.

    Raises:
        ConversionError: Tensors are missing, left over, or of the wrong size.
    """
    tensors = taken_apart(tensors)
    wanted = [
        name for rule in model.rules for i in _layers(rule, model) for name in rule.hf_names(i)
    ]
    found = [name for name in tensors if not name.endswith(DERIVED_TENSORS)]
    if model.is_tied and "lm_head.weight" in found:
        _require_tied(tensors)
        found.remove("lm_head.weight")
    _require_all(wanted, found, "the Hugging Face folder")
    placed = []
    for rule in model.rules:
        for layer in _layers(rule, model):
            parts = [tensors[name] for name in rule.hf_names(layer)]
            whole = merged(rule, parts, model.heads, verify=verify)
            _require_sizes(rule, whole, model)
            placed.append(PlacedTensor(rule.megatron, layer if rule.is_per_layer else None, whole))
    return placed


def to_hf(
    tensors: Mapping[str, torch.Tensor], model: Model, *, verify: bool
) -> dict[str, torch.Tensor]:
    """Map a Megatron checkpoint's tensors to Hugging Face's, without vocabulary padding.

    Args:
        tensors: By checkpoint key; with the layer axis where there is one.
        model: Sizes and rules.
        verify: Map every tensor back and compare bitwise.

    Raises:
        ConversionError: Tensors are missing, left over, or of the wrong size.
    """
    _require_all([rule.megatron for rule in model.rules], list(tensors), "the checkpoint")
    result: dict[str, torch.Tensor] = {}
    for rule in model.rules:
        stacked = tensors[rule.megatron]
        if rule.is_per_layer and stacked.shape[0] != model.num_layers:
            raise ConversionError(
                f"{rule.megatron} has {stacked.shape[0]} layers and the configuration "
                f"{model.num_layers}; give the configuration of this checkpoint (--like)"
            )
        for layer in _layers(rule, model):
            whole = stacked[layer] if rule.is_per_layer else stacked
            if rule.has_vocabulary_rows:
                whole = whole[: model.vocab_size]
            _require_sizes(rule, whole, model)
            parts = split(rule, whole, model.heads, verify=verify)
            result.update(zip(rule.hf_names(layer), parts, strict=True))
    return result


def _layers(rule: Rule, model: Model) -> Iterator[int]:
    yield from range(model.num_layers if rule.is_per_layer else 1)


def _require_tied(tensors: Mapping[str, torch.Tensor]) -> None:
    if not same_bits(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        raise ConversionError(
            "tie_word_embeddings is true and lm_head.weight is not model.embed_tokens.weight; "
            "set tie_word_embeddings to false in config.json, or remove the tensor that is wrong"
        )


def _require_all(wanted: list[str], found: list[str], where: str) -> None:
    has, needs = set(found), set(wanted)
    missing = [name for name in wanted if name not in has]
    extra = [name for name in found if name not in needs]
    if missing or extra:
        raise ConversionError(
            f"{where} lacks {len(missing)} tensors ({_some(missing)}) and has {len(extra)} that "
            f"no rule takes ({_some(extra)}); its configuration describes another model"
        )


def _some(names: list[str], limit: int = 6) -> str:
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest


def _require_sizes(rule: Rule, whole: torch.Tensor, model: Model) -> None:
    if rule.has_vocabulary_rows and tuple(whole.shape) != (model.vocab_size, model.hidden_size):
        raise ConversionError(
            f"{rule.megatron} is {tuple(whole.shape)}, and the configuration says a vocabulary of "
            f"{model.vocab_size:,} and a hidden size of {model.hidden_size:,}; mend vocab_size in "
            "config.json, or give the configuration of this checkpoint"
        )
