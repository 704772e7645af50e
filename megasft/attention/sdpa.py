"""Attention by torch's ``scaled_dot_product_attention``, one span at a time. CPU and GPU.

torch picks the kernel. A document's cost is its own square, never the row's. A span whose queries
are fewer than its keys (a late slice under context parallelism) takes an explicit mask of that
slice, because torch's ``is_causal`` aligns at the start, not at the end. Many short documents mean
many small kernels: on GPUs Transformer Engine is the fast road, this is the one that always works.
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
) -> torch.Tensor:
    """Attend span by span; see ``AttentionBackend``."""
    contexts = []
    for span in spans:
        # [tokens, heads, size] -> [1, heads, tokens, size]
        q = query[span.q_start : span.q_end].transpose(0, 1).unsqueeze(0)
        k = key[span.k_start : span.k_end].transpose(0, 1).unsqueeze(0)
        v = value[span.k_start : span.k_end].transpose(0, 1).unsqueeze(0)
        is_square = q.shape[2] == k.shape[2]
        context = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if is_square else _causal_at_the_end(q.shape[2], k.shape[2], q.device),
            is_causal=is_square,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        contexts.append(context.squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


def _causal_at_the_end(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return bool [queries, keys]; the last query sees every key."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.tril(diagonal=num_keys - num_queries)
