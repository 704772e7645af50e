"""Megatron's core-attention interface, filled with one of our backends.

Plugged in through the layer spec. Megatron hands over this rank's heads and this rank's share of
the tokens; ``PackedRow`` carries the borders of the whole row beside Megatron's own fields, on the
host, so that no attention layer has to read them back from a device.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megasft.attention.all_gather import gather_row, row_order
from megasft.attention.backend import BACKENDS
from megasft.cp_layout import Span, attention_spans
from megasft.errors import FlagError


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of packed rows, with the borders on the host.

    Attributes:
        borders: Aligned document borders of the whole flat micro-batch; starts at 0.
        cp_rank: This rank's place in its context-parallel group.
        cp_size: Ranks that share a row.
    """

    borders: tuple[int, ...] = (0,)
    cp_rank: int = 0
    cp_size: int = 1

    @cached_property
    def spans(self) -> list[Span]:
        """What each run of this rank's queries attends to; the same for all layers."""
        borders = np.asarray(self.borders)
        return attention_spans(borders, cp_rank=self.cp_rank, cp_size=self.cp_size)

    @cached_property
    def order(self) -> torch.Tensor:
        """Where each row position lies in the gathered shares; on the device, once per row."""
        return row_order(self.borders, cp_size=self.cp_size).to(self.cu_seqlens_q.device)


def packed_row(
    cu_seqlens: torch.Tensor, *, device: torch.device, cp_rank: int, cp_size: int
) -> PackedRow:
    """Describe a flat micro-batch to Megatron and to our attention.

    Args:
        cu_seqlens: int32 [D + 1], CPU. Aligned document borders of the whole micro-batch.
        device: Where Megatron wants its copy.
        cp_rank: This rank's place in its context-parallel group.
        cp_size: Ranks that share a row.
    """
    borders = tuple(cu_seqlens.tolist())
    longest = max(b - a for a, b in pairwise(borders))
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=on_device,
        cu_seqlens_kv_padded=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        borders=borders,
        cp_rank=cp_rank,
        cp_size=cp_size,
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
        backend: str = "sdpa",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_what_is_not_computed(config, attention_type)
        self.attend = BACKENDS[backend]
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        row = packed_seq_params
        if row.cp_size > 1:
            key, value = (gather_row(x, row.order, self.cp_group) for x in (key, value))
        context = self.attend(query, key, value, spans=row.spans, scale=self.scale)
        return context.flatten(1)


def _refuse_what_is_not_computed(config: Any, attention_type: str) -> None:
    """Raise for model options these backends would silently ignore."""
    refused = {
        "attention_type other than self": attention_type != "self",
        "--attention-dropout above 0": config.attention_dropout > 0,
        "--window-size (sliding window)": getattr(config, "window_size", None) is not None,
        "--softmax-type other than vanilla": getattr(config, "softmax_type", "vanilla")
        != "vanilla",
        "--apply-query-key-layer-scaling": config.apply_query_key_layer_scaling,
    }
    asked = [what for what, is_asked in refused.items() if is_asked]
    if asked:
        raise FlagError(
            f"megasft attention does not compute {', '.join(asked)}; "
            "drop the flag, or use --megasft-attention te on a GPU"
        )
