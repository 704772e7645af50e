"""All tensors of a model, from one side to the other: nothing missing, nothing left over."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from checkpoint_convert.config_map import Model
from checkpoint_convert.families import DERIVED_TENSORS
from checkpoint_convert.fused_experts import taken_apart
from checkpoint_convert.pieces import Piece, pieces
from checkpoint_convert.rules import Rule, merged, same_bits, split
from megasft.errors import ConversionError

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class PlacedTensor(NamedTuple):
    """A piece and its content, without the leading axes."""

    piece: Piece
    data: torch.Tensor


def require_hf_names(found: Collection[str], model: Model) -> bool:
    """Check that a folder holds a model's tensors and no others.

    Args:
        found: Names in the folder, every expert by itself.
        model: Its configuration.

    Returns:
        Whether a tied output layer is there as well, which must then equal the embedding.

    Raises:
        ConversionError: Tensors are missing or left over.
    """
    names = [name for name in found if not name.endswith(DERIVED_TENSORS)]
    repeats_tied = model.is_tied and OUTPUT in names
    if repeats_tied:
        names.remove(OUTPUT)
    _require_all([n for p in pieces(model) for n in p.hf], names, "the Hugging Face folder")
    return repeats_tied


def mtp_names(found: Collection[str], model: Model) -> list[str]:
    """Return the names of multi-token prediction layers, which lie behind the model's own.

    Released DeepSeek-V3 folders have one. transformers does not build it.
    """
    count = int(model.hf_config.get("num_nextn_predict_layers") or 0)
    prefixes = tuple(f"model.layers.{model.num_layers + i}." for i in range(count))
    return [name for name in found if prefixes and name.startswith(prefixes)]


def require_keys(found: Collection[str], model: Model) -> None:
    """Check that a checkpoint holds a model's tensors and no others.

    Raises:
        ConversionError: Tensors are missing or left over.
    """
    _require_all([rule.megatron for rule in model.rules], found, "the checkpoint")


def require_axes(piece: Piece, shape: tuple[int, ...], model: Model) -> None:
    """Check the leading axes of a global tensor: layers and experts.

    Raises:
        ConversionError: Their sizes are not the configuration's.
    """
    sizes = shape[: len(piece.axes)]
    if sizes != piece.axes:
        has, needs = (_axes(piece.rule, axes) for axes in (sizes, piece.axes))
        raise ConversionError(
            f"{piece.key} has {has} and the configuration {needs}; give the configuration of this "
            "checkpoint (--like)"
        )


def require_tied(embedding: torch.Tensor, output: torch.Tensor) -> None:
    """Check that an output layer which should be the embedding is.

    Raises:
        ConversionError: It is not.
    """
    if not same_bits(embedding, output):
        raise ConversionError(
            f"tie_word_embeddings is true and {OUTPUT} is not {EMBEDDING}; set "
            "tie_word_embeddings to false in config.json, or remove the tensor that is wrong"
        )


def merge_piece(
    piece: Piece, parts: list[torch.Tensor], model: Model, *, verify: bool
) -> torch.Tensor:
    """Make a piece of Hugging Face's tensors; with ``verify`` they must come back bitwise.

    Raises:
        ConversionError: Sizes or dtypes do not fit.
    """
    whole = merged(piece.rule, parts, model.heads, verify=verify)
    require_sizes(piece.rule, tuple(whole.shape), model)
    return whole


def split_piece(
    piece: Piece, whole: torch.Tensor, model: Model, *, verify: bool
) -> dict[str, torch.Tensor]:
    """Take a piece apart into Hugging Face's tensors by name, without vocabulary padding.

    Raises:
        ConversionError: Sizes do not fit, or ``verify`` finds the way back not the same.
    """
    if piece.rule.has_vocabulary_rows:
        whole = whole[: model.vocab_size]
    require_sizes(piece.rule, tuple(whole.shape), model)
    return dict(zip(piece.hf, split(piece.rule, whole, model.heads, verify=verify), strict=True))


def require_sizes(rule: Rule, shape: tuple[int, ...], model: Model) -> None:
    """Check that embedding and output have the configuration's sizes.

    Raises:
        ConversionError: They have others.
    """
    if rule.has_vocabulary_rows and shape != (model.vocab_size, model.hidden_size):
        raise ConversionError(
            f"{rule.megatron} is {shape}, and the configuration says a vocabulary of "
            f"{model.vocab_size:,} and a hidden size of {model.hidden_size:,}; mend vocab_size in "
            "config.json, or give the configuration of this checkpoint"
        )


def to_megatron(
    tensors: Mapping[str, torch.Tensor], model: Model, *, verify: bool
) -> list[PlacedTensor]:
    """Map a Hugging Face model that is in memory to Megatron's pieces.

    Raises:
        ConversionError: Tensors are missing, left over, or of the wrong size.
    """
    tensors = taken_apart(tensors)
    if require_hf_names(tensors, model):
        require_tied(tensors[EMBEDDING], tensors[OUTPUT])
    return [
        PlacedTensor(p, merge_piece(p, [tensors[n] for n in p.hf], model, verify=verify))
        for p in pieces(model)
    ]


def to_hf(
    tensors: Mapping[str, torch.Tensor], model: Model, *, verify: bool
) -> dict[str, torch.Tensor]:
    """Map a Megatron model that is in memory to Hugging Face's tensors.

    Args:
        tensors: By checkpoint key; with the layer and expert axes where there are any.
        model: Sizes and rules.
        verify: Map every tensor back and compare bitwise.

    Raises:
        ConversionError: Tensors are missing, left over, or of the wrong size.
    """
    require_keys(tensors, model)
    result: dict[str, torch.Tensor] = {}
    for piece in pieces(model):
        stacked = tensors[piece.key]
        require_axes(piece, tuple(stacked.shape), model)
        result |= split_piece(piece, stacked[piece.place], model, verify=verify)
    return result


def _axes(rule: Rule, sizes: tuple[int, ...]) -> str:
    names = [
        name
        for name, is_there in (("layers", rule.is_per_layer), ("experts", rule.is_per_expert))
        if is_there
    ]
    return " and ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=False))


def _require_all(wanted: Collection[str], found: Collection[str], where: str) -> None:
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
