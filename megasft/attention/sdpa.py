"""Attention by torch's ``scaled_dot_product_attention``, one span at a time. CPU and GPU.

torch picks the kernel. A document's cost is its own square, never the row's. A span whose queries
are fewer than its keys (a late slice under context parallelism), or that a window cuts, takes an
explicit mask of that slice, kept for backward, because torch's ``is_causal`` aligns at the start
and knows no window. Many short documents mean many small kernels: this is the backend with the
fewest lines of our own between the model and torch, to compare ``ring`` and ``all_gather`` with.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from megasft.cp_layout import Span


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    spans: Sequence[Span],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attend span by span; see ``SpanAttention``."""
    contexts = []
    for span in spans:
        # [tokens, heads, size] -> [1, heads, tokens, size]
        q = query[span.q_start : span.q_end].transpose(0, 1).unsqueeze(0)
        k = key[span.k_start : span.k_end].transpose(0, 1).unsqueeze(0)
        v = value[span.k_start : span.k_end].transpose(0, 1).unsqueeze(0)
        mask = _mask(q.shape[2], k.shape[2], window, q.device)
        context = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        contexts.append(context.squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


def _mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return bool [queries, keys], the last query seeing the last key; None for plain causal."""
    is_cut = window is not None and num_keys > window + 1
    if num_queries == num_keys and not is_cut:
        return None
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    causal = full.tril(diagonal=num_keys - num_queries)
    return causal if window is None else causal.triu(diagonal=num_keys - num_queries - window)
