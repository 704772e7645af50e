"""Rotary embeddings of a packed row: cos and sin gathered by position, once per micro-batch.

Megatron rotates packed rows document by document, in Python, in each layer, and reads the length of
each document back from the device: 1,263 operators a layer with one document in a row, 25,800 with
128. Here Megatron's own table (its frequencies, scaled or not) is indexed by the positions of the
shard's tokens, and all layers use the two tensors that come of it. The numbers are the same bit by
bit, because a rotation is computed element by element.

The modules stand where Megatron's ``rotary_pos_emb`` stood and learn of a row when the model asks
for the length of the table. Ordinary attention is then given no embedding, and our core attention
rotates: it has queries and keys after their norms, and the row. Latent attention rotates inside its
projections; it is given the gathered angles, and no boundaries, so that it takes the path without
the loop. Kept as they are: Transformer Engine's fused kernels, which have no loop.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class Rotation(NamedTuple):
    """What rotates the heads of a shard's tokens.

    Attributes:
        cos: float [T, 1, R], R <= E the rotated part of a head.
        sin: As ``cos``.
        interleaved: Neighbours make a pair; else element ``i`` and ``i + R / 2``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def of(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys.

        Args:
            heads: float [T, H, E].

        Returns:
            float [T, H, E].

        Source: arXiv 2104.09864; ``_apply_rotary_pos_emb_bshd`` of Megatron, whose order of
        operations this follows.
        """
        size = self.cos.shape[-1]
        rotated, rest = heads[..., :size], heads[..., size:]
        turned = _quarter_turn(rotated, interleaved=self.interleaved)
        rotated = rotated * self.cos + turned * self.sin
        return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def _quarter_turn(heads: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Turn each pair (a, b) into (-b, a)."""
    if interleaved:
        return torch.stack((-heads[..., 1::2], heads[..., ::2]), -1).flatten(-2)
    first, second = heads.chunk(2, -1)
    return torch.cat((-second, first), -1)


class _RowRope(torch.nn.Module):
    """Megatron's rotary embedding, asked for the positions of a row.

    Args:
        rotary: Megatron's module.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self._angles = torch.zeros(0, 1, 0)

    def angles(self, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Return float32 [T, 1, R]: the angles of tokens.

        Args:
            positions: int64 [T]. Place of each token in its document.
            longest: Tokens of the longest document, known on the host; positions are below it.
        """
        if longest > len(self._angles):
            # The next power of two: a longer document comes seldom then.
            table = self.rotary.get_emb(1 << (longest - 1).bit_length())
            self._angles = (table[0] if isinstance(table, tuple) else table)[:, 0]
        return self._angles.index_select(0, positions)


class HeadRope(_RowRope):
    """Gives the model no embedding, and the row's core attention the rotation instead.

    Args:
        rotary: Megatron's module.
        config: Its ``TransformerConfig``.
    """

    def __init__(self, rotary: Any, config: Any) -> None:
        super().__init__(rotary)
        self._scale = _yarn_get_concentration_factor_from_config(config)
        self._interleaved = bool(config.rotary_interleaved)

    def get_rotary_seq_len(self, *unused: Any) -> int:
        """Take notice of the row, which Megatron passes as the last argument."""
        unused[-1].rope = self
        return 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return no embedding, so that attention does not rotate."""
        return (None, 1.0) if isinstance(self.rotary, YarnRotaryEmbedding) else None

    def rotation(self, positions: torch.Tensor, longest: int, dtype: torch.dtype) -> Rotation:
        """Return cos and sin of a row, in the type its heads are computed in."""
        angles = self.angles(positions, longest)
        cos, sin = ((f(angles) * self._scale).to(dtype) for f in (torch.cos, torch.sin))
        return Rotation(cos, sin, self._interleaved)


class LatentRope(_RowRope):
    """Gives all layers of latent attention the angles of a row, gathered once."""

    def __init__(self, rotary: Any) -> None:
        super().__init__(rotary)
        self._row: Any = None

    def get_rotary_seq_len(self, *unused: Any) -> int:
        """Take notice of the row, which Megatron passes as the last argument."""
        self._row = unused[-1]
        return 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the angles, and YaRN's factor where Megatron's module has one."""
        row, self._row = self._row, None
        if not row.gathered:
            row.gathered.append(self.angles(row.positions, row.max_seqlen_q))
        (angles,) = row.gathered
        table = self.rotary.get_emb(1)
        return (angles, table[1]) if isinstance(table, tuple) else angles


class PackedLatentAttention(MLASelfAttention):
    """Megatron's latent attention, which rotates a row at once.

    Its path without boundaries computes the same on angles that are those of each token already.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: Any = None,
        position_ids: Any = None,
        packed_seq_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Project, norm and rotate; see Megatron's method."""
        names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
        row = replace(packed_seq_params, **dict.fromkeys(names))
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, row, *args, **kwargs
        )


def rotate_rows(model: Any) -> None:
    """Let one pipeline stage of Megatron's model rotate packed rows at once.

    Args:
        model: Its scaled frequencies are in place, and it has not run yet.
    """
    if hasattr(model, "rotary_pos_emb"):
        model.rotary_pos_emb = HeadRope(model.rotary_pos_emb, model.config)
    latent = [each for each in model.modules() if isinstance(each, PackedLatentAttention)]
    if latent:
        rope = LatentRope(latent[0].rotary_pos_emb)
        for attention in latent:
            attention.rotary_pos_emb = rope
