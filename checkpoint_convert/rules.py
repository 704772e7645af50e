"""How Hugging Face's tensors lie inside Megatron's: one rule per Megatron tensor, both ways.

A rule names the tensors on both sides and how they join. Both directions sit in one value, so they
cannot drift apart, and ``merged`` and ``split`` check each other bit by bit. The alternative, one
function per model and direction, is how converters come to be right one way only.

Rules speak of whole tensors: cutting them for tensor or pipeline parallelism is the loading run's
business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

from megasft.errors import ConversionError


class Heads(NamedTuple):
    """Attention sizes. ``num_groups`` counts key/value heads, which Megatron calls query groups."""

    num_heads: int
    num_groups: int
    head_dim: int


class Join(NamedTuple):
    """One way in which several tensors become one, and back."""

    merge: Callable[[Sequence[torch.Tensor], Heads], torch.Tensor]
    split: Callable[[torch.Tensor, Heads], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        megatron: Key in the checkpoint; a tensor that every layer, or every routed expert, has
            has the layer, then the expert, as its first axes.
        hf: Names in the Hugging Face folder, in the order ``join`` takes them; ``{layer}`` and
            ``{expert}`` stand for indices.
        join: How the tensors become one.
        has_vocabulary_rows: The first axis is the vocabulary, which a run may have padded.
        is_buffer: Not trained by gradients, and kept in the dtype it is stored in.
        layer: The layer of a tensor that only this layer has, ``at`` sets it.
    """

    megatron: str
    hf: tuple[str, ...]
    join: Join
    has_vocabulary_rows: bool = False
    is_buffer: bool = False
    layer: int | None = None

    @property
    def is_per_layer(self) -> bool:
        """Whether every layer has its own tensor."""
        return "{layer}" in self.hf[0]

    @property
    def is_per_expert(self) -> bool:
        """Whether every routed expert has its own tensor."""
        return "{expert}" in self.hf[0]

    def at(self, layer: int) -> "Rule":
        """Return the rule of one layer alone, for a checkpoint without a layer axis."""
        return replace(
            self,
            megatron=self.megatron.replace("decoder.layers.", f"decoder.layers.{layer}.", 1),
            hf=tuple(name.replace("{layer}", str(layer)) for name in self.hf),
            layer=layer,
        )

    def hf_names(self, *, layer: int = 0, expert: int = 0) -> tuple[str, ...]:
        """Return the Hugging Face names of one layer's and one expert's tensors."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)


def _merge_qkv(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Interleave Q, K and V by query group: ``q q k v | q q k v | ...`` for two heads per group.

    Megatron cuts this tensor along its first axis for tensor parallelism; every rank then has
    whole groups. Works on weights ``[heads * head_dim, hidden]`` and biases alike.
    """
    by_group = [part.reshape(heads.num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _split_qkv(whole: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    q_rows = heads.num_heads // heads.num_groups * heads.head_dim
    rows = heads.num_groups * (q_rows + 2 * heads.head_dim)
    if whole.shape[0] != rows:
        raise ConversionError(
            f"a linear_qkv tensor has {whole.shape[0]:,} rows, and {heads.num_heads} heads with "
            f"{heads.num_groups} key/value heads of {heads.head_dim} make {rows:,}; give the "
            "configuration this checkpoint was trained with (--like)"
        )
    by_group = whole.reshape(heads.num_groups, -1, *whole.shape[1:])
    cuts = (q_rows, q_rows + heads.head_dim)
    return tuple(part.flatten(0, 1) for part in torch.tensor_split(by_group, cuts, dim=1))


WHOLE: Final = Join(merge=lambda parts, _: parts[0], split=lambda whole, _: (whole,))
"""The same tensor under another name."""

QKV: Final = Join(merge=_merge_qkv, split=_split_qkv)
"""Q, K and V, interleaved by query group."""

GATED: Final = Join(
    merge=lambda parts, _: torch.cat(tuple(parts)), split=lambda whole, _: tuple(whole.chunk(2))
)
"""Gate, then up projection."""


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors hold the same bytes; unlike ``==`` this is true for nan, too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def merged(
    rule: Rule, parts: Sequence[torch.Tensor], heads: Heads, *, verify: bool
) -> torch.Tensor:
    """Join Hugging Face's tensors into Megatron's.

    Raises:
        ConversionError: The dtypes differ, or ``verify`` finds the way back not bitwise the same.
    """
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ConversionError(
            f"{', '.join(rule.hf)} become one tensor in Megatron, and have the dtypes "
            f"{', '.join(sorted(map(str, dtypes)))}; save the model in one dtype first"
        )
    whole = rule.join.merge(parts, heads).contiguous()
    if verify:
        _require_same(rule, rule.join.split(whole, heads), parts)
    return whole


def split(
    rule: Rule, whole: torch.Tensor, heads: Heads, *, verify: bool
) -> tuple[torch.Tensor, ...]:
    """Take Megatron's tensor apart into Hugging Face's.

    Raises:
        ConversionError: The shape does not fit, or ``verify`` finds the way back not the same.
    """
    parts = tuple(part.contiguous() for part in rule.join.split(whole, heads))
    if len(parts) != len(rule.hf):
        raise ConversionError(
            f"{rule.megatron} of shape {tuple(whole.shape)} holds {len(parts)} tensors, and the "
            f"configuration says {len(rule.hf)}; give the configuration of this checkpoint (--like)"
        )
    if verify:
        _require_same(rule, (rule.join.merge(parts, heads),), (whole,))
    return parts


def _require_same(
    rule: Rule, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> None:
    if len(found) != len(wanted) or not all(map(same_bits, found, wanted)):
        shapes = " ".join(str(tuple(tensor.shape)) for tensor in wanted)
        raise ConversionError(
            f"{rule.megatron} does not come back bitwise from shapes {shapes}; the sizes in the "
            "configuration do not fit these tensors"
        )
