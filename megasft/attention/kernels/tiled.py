"""Attention in tiles of scores, in plain torch: any device, type, head size and sliding window.

The fallback of the other kernels, and the only one that counts a window across the gaps of a
zigzag share, because it masks by the tokens' positions. A tile of scores lives only while it is
used, and backward computes it again, so memory is linear in the row. The price is Python: one round
of small matrix products per tile, which on a GPU leaves most of it idle.

Source of the recomputation: Dao et al. 2022, arXiv:2205.14135, algorithm 4.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import torch

from megasft.attention.blocks import Block
from megasft.attention.kernels.kernel import QKV
from megasft.attention.online_softmax import accumulator_dtype, merge

TILE: Final = 512
"""Queries and keys of a tile; a tile of scores takes ``H * TILE * TILE`` floats."""


def refusal(qkv: QKV, block: Block) -> str | None:
    """See ``Refusal``; it computes everything."""
    return None


def forward(qkv: QKV, block: Block, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Forward``."""
    tokens, heads, _ = qkv.query.shape
    dtype, device = accumulator_dtype(qkv.query.dtype), qkv.query.device
    out = torch.zeros(tokens, heads, qkv.value.shape[-1], dtype=dtype, device=device)
    lse = torch.full((tokens, heads), float("-inf"), dtype=dtype, device=device)
    groups = qkv.key.shape[1]
    for rows, columns, visible in _tiles(block):
        scores_GNK = _scores(qkv, rows, columns, visible, scale=scale)
        lse_GN = scores_GNK.logsumexp(dim=-1, keepdim=True)
        # A query that sees no key here: -inf - -inf is nan, and its probabilities must be 0.
        lse_finite = lse_GN.masked_fill(lse_GN == float("-inf"), 0.0)
        value_GKF = _by_group(qkv.value[columns], groups, dtype)
        tile_out = scores_GNK.sub_(lse_finite).exp_() @ value_GKF
        merge(out, lse, _by_token(tile_out, heads), _by_token(lse_GN, heads)[..., 0], rows=rows)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    qkv: QKV,
    out: torch.Tensor,
    lse: torch.Tensor,
    block: Block,
    *,
    scale: float,
) -> QKV:
    """See ``Backward``; gradients are float32 or wider."""
    dtype = accumulator_dtype(qkv.query.dtype)
    groups, heads = qkv.key.shape[1], qkv.query.shape[1]
    delta_TH1 = (grad_out.to(dtype) * out.to(dtype)).sum(dim=-1, keepdim=True)
    grads = QKV(*(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in qkv))
    for rows, columns, visible in _tiles(block):
        query_GNE = _by_group(qkv.query[rows], groups, dtype)
        key_GKE, value_GKF = (_by_group(x[columns], groups, dtype) for x in qkv[1:])
        grad_GNF = _by_group(grad_out[rows], groups, dtype)
        lse_GN1 = _by_group(lse[rows].unsqueeze(-1), groups, dtype)
        delta_GN1 = _by_group(delta_TH1[rows], groups, dtype)
        probs_GNK = _scores(qkv, rows, columns, visible, scale=scale).sub_(lse_GN1).exp_()
        grads.value[columns] += _by_token(probs_GNK.mT @ grad_GNF, groups)
        # d(softmax): p * (dp - sum(p dp)), and sum(p dp) over all keys is grad_out . out
        grad_scores_GNK = (grad_GNF @ value_GKF.mT).sub_(delta_GN1).mul_(probs_GNK).mul_(scale)
        grads.query[rows] += _by_token(grad_scores_GNK @ key_GKE, heads)
        grads.key[columns] += _by_token(grad_scores_GNK.mT @ query_GNE, groups)
    return grads


def _scores(
    qkv: QKV, rows: slice, columns: slice, visible: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """Return float [G, H / G * queries, keys], -inf where the key is not visible."""
    groups, dtype = qkv.key.shape[1], accumulator_dtype(qkv.query.dtype)
    query_GNE = _by_group(qkv.query[rows], groups, dtype)
    scores_GNK = (query_GNE @ _by_group(qkv.key[columns], groups, dtype).mT).mul_(scale)
    if visible is not None:
        scores_GNK.view(groups, -1, *visible.shape).masked_fill_(~visible, float("-inf"))
    return scores_GNK


def _tiles(block: Block) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Yield the tiles in which anything is visible: queries, keys, and a mask where one is needed.

    Decided on the host, from the ends of the ascending positions.
    """
    pieces = zip(pairwise(block.borders_q), pairwise(block.borders_k), strict=True)
    for (q_start, q_end), (k_start, k_end) in pieces:
        for q in range(q_start, q_end, TILE):
            rows = slice(q, min(q + TILE, q_end))
            for k in range(k_start, k_end, TILE):
                columns = slice(k, min(k + TILE, k_end))
                positions_q, positions_k = block.positions_q[rows], block.positions_k[columns]
                newest, oldest = positions_q[-1] - positions_k[0], positions_q[0] - positions_k[-1]
                window = newest if block.window is None else block.window
                if newest < 0 or oldest > window:
                    continue
                if oldest >= 0 and newest <= window:
                    yield rows, columns, None
                    continue
                distance = torch.from_numpy(positions_q[:, None] - positions_k)
                visible = (distance >= 0) & (distance <= int(window))
                yield rows, columns, visible.to(block.device, non_blocking=True)


def _by_group(x: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn [tokens, heads, size] into [groups, heads / groups * tokens, size]."""
    tokens, heads, size = x.shape
    x_TGRE = x.to(dtype).reshape(tokens, groups, heads // groups, size)
    return x_TGRE.permute(1, 2, 0, 3).reshape(groups, -1, size)


def _by_token(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn [groups, heads / groups * tokens, size] into [tokens, heads, size]."""
    return x.reshape(heads, -1, x.shape[-1]).transpose(0, 1)
