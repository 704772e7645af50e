"""Attention by torch's ``scaled_dot_product_attention``, one span at a time. CPU and GPU.

torch picks the kernel. A document's cost is its own square, never the row's. A span whose queries
are fewer than its keys (a late slice under context parallelism), or that a window cuts, takes an
explicit mask of that slice, because torch's ``is_causal`` aligns at the start and knows no window.
Such a span is computed again in backward rather than its mask kept: one mask lives at a time. Many
short documents mean many small kernels: this is the backend with the fewest lines of our own
between the model and torch, to compare ``ring`` and ``all_gather`` with.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

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
        attend = partial(_attend, scale=scale, window=window)
        if _is_plain_causal(q.shape[2], k.shape[2], window):
            context = attend(q, k, v)
        else:
            context = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
        contexts.append(context.squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """Compute one span, ``[1, heads, tokens, size]``."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    is_plain = _is_plain_causal(num_queries, num_keys, window)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_plain else _mask(num_queries, num_keys, window, q.device),
        is_causal=is_plain,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _is_plain_causal(num_queries: int, num_keys: int, window: int | None) -> bool:
    return num_queries == num_keys and (window is None or num_keys <= window + 1)


def _mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Return bool [queries, keys], the last query seeing the last key."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    causal = full.tril(diagonal=num_keys - num_queries)
    return causal if window is None else causal.triu(diagonal=num_keys - num_queries - window)
