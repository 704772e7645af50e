"""Megatron's core-attention interface, filled with one of our backends.

Plugged in through the layer spec. Megatron hands over this rank's heads and this rank's share of
the tokens; ``PackedRow`` carries the borders of the whole row beside Megatron's own fields, on the
host, so that no attention layer has to read them back from a device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from megasft.attention.backend import BACKENDS
from megasft.attention.blocks import RowLayout
from megasft.errors import FlagError


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """Megatron's description of packed rows, with the borders on the host.

    Attributes:
        layout: The row's borders and cut, and what the layers derive from them.
        positions: int64 [T], on the device. Place of each of the shard's tokens in its document.
        rope: Rotates heads in core attention; None where Megatron rotates, or nothing does.
        gathered: What the rope took from its table for this row; filled by the first layer.
        shifts: How multi-token prediction shifts this row; filled by its first shift.
    """

    layout: RowLayout
    positions: torch.Tensor
    rope: Any = None
    gathered: list[Any] = field(default_factory=list)
    shifts: list[Any] = field(default_factory=list)

    def rotation(self, dtype: torch.dtype) -> Any:
        """Return what rotates the heads of this row, made once."""
        if not self.gathered:
            self.gathered.append(self.rope.rotation(self.positions, self.max_seqlen_q, dtype))
        return self.gathered[0]

    def shift(self, make: Callable[[RowLayout], Any]) -> Any:
        """Return how this row is shifted by a token, made once."""
        if not self.shifts:
            self.shifts.append(make(self.layout))
        return self.shifts[0]


def packed_row(
    cu_seqlens: torch.Tensor,
    positions: torch.Tensor,
    *,
    cp_rank: int,
    cp_size: int,
) -> PackedRow:
    """Describe a flat micro-batch to Megatron and to our attention.

    Args:
        cu_seqlens: int32 [D + 1], CPU. Aligned document borders of the whole micro-batch.
        positions: int64 [T], on the device. Place of each of the shard's tokens in its document.
        cp_rank: This rank's place in its context-parallel group.
        cp_size: Ranks that share a row.
    """
    borders = tuple(cu_seqlens.tolist())
    longest = max(b - a for a, b in pairwise(borders))
    on_device = cu_seqlens.to(positions.device, non_blocking=True)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=on_device,
        cu_seqlens_kv_padded=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        layout=RowLayout(
            borders=borders, cp_rank=cp_rank, cp_size=cp_size, device=on_device.device
        ),
        positions=positions,
    )


class PackedCoreAttention(MegatronModule):
    """Attention over packed rows for Megatron's ``SelfAttention``; see ``CoreAttentionBuilder``."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        backend: str = "ring",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_is_not_computed(config, attention_type, cp_comm_type)
        self.attend = BACKENDS[backend]
        self.cp_group = pg_collection.cp
        # Multi-latent attention passes its own scale; kv_channels is not its head size.
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = sliding_window(config, layer_number)
        self.is_rotated = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> torch.Tensor:
        """Attend within documents.

        Args:
            query: float [T, H, E]. This rank's share of the tokens, this rank's heads.
            key: float [T, G, E].
            value: float [T, G, F].
            attention_mask: Not used: the borders are the mask.
            attn_mask_type: Not used: always causal.
            attention_bias: Must be None.
            packed_seq_params: The row's borders.

        Returns:
            float [T, H * F].
        """
        if packed_seq_params is None or attention_bias is not None:
            raise FlagError("megasft attention computes packed rows without attention bias only")
        if packed_seq_params.rope is not None and self.is_rotated:
            rotation = packed_seq_params.rotation(query.dtype)
            query, key = rotation.of(query), rotation.of(key)
        row = packed_seq_params.layout
        context = self.attend(
            query,
            key,
            value,
            row=row,
            scale=self.scale,
            window=row.window_that_matters(self.window),
            group=self.cp_group,
        )
        return context.flatten(1)


def sliding_window(config: Any, layer_number: int) -> int | None:
    """Return how many keys before its own position a query of this layer sees, or None for all.

    Megatron's ``window_size`` is ``(left, right)``, -1 without a limit; under a causal mask the
    right side has no meaning, in Transformer Engine neither.

    Args:
        config: Megatron's ``TransformerConfig``.
        layer_number: Counts from 1, over all pipeline stages.
    """
    skip = config.window_attn_skip_freq
    if not is_layer_window_attention(config.window_size, skip, layer_number):
        return None
    left = int(config.window_size[0])
    return left if left >= 0 else None


def _refuse_what_is_not_computed(
    config: Any, attention_type: str, cp_comm_type: str | None
) -> None:
    """Raise for model options these backends would silently ignore."""
    refused = {
        "attention_type other than self": attention_type != "self",
        "--attention-dropout above 0": config.attention_dropout > 0,
        "--softmax-type other than vanilla (sinks)": config.softmax_type != "vanilla",
        "--qk-clip": config.qk_clip,
        "--log-max-attention-logit": config.log_max_attention_logit,
        "--apply-query-key-layer-scaling": config.apply_query_key_layer_scaling,
    }
    asked = [what for what, is_asked in refused.items() if is_asked]
    if asked:
        raise FlagError(
            f"megasft attention does not compute {', '.join(asked)}; "
            "drop the flag, or use --megasft-attention te on a GPU"
        )
    if cp_comm_type not in (None, "p2p"):
        raise FlagError(
            f"--cp-comm-type {cp_comm_type} is read by Transformer Engine only; drop it and choose "
            "with --megasft-attention ring or all_gather, or use --megasft-attention te on a GPU"
        )
