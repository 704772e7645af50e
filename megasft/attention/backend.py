"""The one function type of an attention backend, and the backends by name.

A backend sees plain tensors, the row's layout and the context-parallel group: it decides how the
ranks come to each other's keys. What computes a block of scores is a separate question, answered by
``kernels/`` for ``ring`` and ``all_gather``. No backend knows Megatron's configuration.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

import torch

from megasft.attention.all_gather import all_gather_attention, gather_row
from megasft.attention.blocks import RowLayout
from megasft.attention.reference import reference_attention
from megasft.attention.ring import ring_attention
from megasft.attention.sdpa import sdpa_attention
from megasft.cp_layout import Span


class AttentionBackend(Protocol):
    """Causal attention within documents.

    Args:
        query: float [T, H, E]. Queries of this share.
        key: float [T, G, E]. Keys of this share; ``H`` is a multiple of ``G``.
        value: float [T, G, F].
        row: The whole row's borders and its cut.
        scale: Multiplies the scores.
        window: A query at position ``p`` sees the keys from ``p - window``; None for all.
        group: The context-parallel group; None when there is one rank.

    Returns:
        float [T, H, F], dtype of ``query``.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        row: RowLayout,
        scale: float,
        window: int | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        """Attend within each document."""
        ...


class SpanAttention(Protocol):
    """Attention of a share's queries to keys in row order; see ``cp_layout.Span``.

    Args:
        query: float [T, H, E]. Queries of this share.
        key: float [K, G, E]. Keys of the whole row.
        value: float [K, G, F].
        spans: Which queries see which keys; each query in exactly one span.
        scale: Multiplies the scores.
        window: As above.

    Returns:
        float [T, H, F], dtype of ``query``.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        spans: Sequence[Span],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attend within each span."""
        ...


def _on_gathered_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row: RowLayout,
    scale: float,
    window: int | None,
    group: torch.distributed.ProcessGroup | None,
    attend: SpanAttention,
) -> torch.Tensor:
    key, value = (gather_row(x, row, group) for x in (key, value))
    return attend(query, key, value, spans=row.spans, scale=scale, window=window)


BACKENDS: Final[dict[str, AttentionBackend]] = {
    "ring": ring_attention,
    "all_gather": all_gather_attention,
    "sdpa": partial(_on_gathered_row, attend=sdpa_attention),
    "reference": partial(_on_gathered_row, attend=reference_attention),
}
"""``--megasft-attention NAME``; ``te`` leaves attention to Transformer Engine."""
