"""The one function type of an attention backend, and the backends by name.

A backend sees plain tensors and a list of spans (``cp_layout.Span``): which queries see which keys,
causal at the end of each span. That covers whole documents and the slices context parallelism
leaves on a rank, so a backend knows nothing of ranks, rows or Megatron.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import torch

from megasft.attention.reference import reference_attention
from megasft.attention.sdpa import sdpa_attention
from megasft.cp_layout import Span


class AttentionBackend(Protocol):
    """Causal attention within documents.

    Args:
        query: float [T, H, E]. Queries of this share.
        key: float [K, G, E]. Keys in row order; ``H`` is a multiple of ``G``.
        value: float [K, G, F].
        spans: Which queries see which keys; each query in exactly one span.
        scale: Multiplies the scores.

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
    ) -> torch.Tensor:
        """Attend within each span."""
        ...


BACKENDS: Final[dict[str, AttentionBackend]] = {
    "sdpa": sdpa_attention,
    "reference": reference_attention,
}
"""``--megasft-attention NAME``; ``te`` leaves attention to Transformer Engine."""
