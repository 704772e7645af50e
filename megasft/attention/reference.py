"""Attention written as the definition: one dense mask, float32 softmax. The oracle, not for speed.

Memory is T x K per head, kept for backward. Use it to debug, or to judge another backend.
"""

from collections.abc import Sequence

import torch

from megasft.cp_layout import Span


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    spans: Sequence[Span],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute softmax(q k^T scale + mask) v over all spans at once; see ``SpanAttention``."""
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    key_KHE = key.to(dtype).repeat_interleave(groups, dim=1)
    value_KHF = value.to(dtype).repeat_interleave(groups, dim=1)
    scores_HTK = torch.einsum("the,khe->htk", query.to(dtype), key_KHE) * scale
    visible_TK = _visible(spans, query.shape[0], key.shape[0], window).to(query.device)
    probs_HTK = scores_HTK.masked_fill(~visible_TK, float("-inf")).softmax(dim=-1)
    return torch.einsum("htk,khf->thf", probs_HTK, value_KHF).to(query.dtype)


def _visible(
    spans: Sequence[Span], num_queries: int, num_keys: int, window: int | None
) -> torch.Tensor:
    """Return bool [T, K]: query t may see key k."""
    visible = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for span in spans:
        rows, columns = span.q_end - span.q_start, span.k_end - span.k_start
        block = torch.ones(rows, columns, dtype=torch.bool).tril(diagonal=columns - rows)
        if window is not None:
            block = block.triu(diagonal=columns - rows - window)
        visible[span.q_start : span.q_end, span.k_start : span.k_end] = block
    return visible
