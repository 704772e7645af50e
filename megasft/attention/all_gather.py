"""Context parallelism by gathering all keys and values of the row before attending.

Each rank keeps its own queries and asks for everybody's keys: two collectives per layer forward,
two backward, and K and V of the whole row kept for backward, against the ring's point-to-point
messages and one share at a time. With grouped-query attention K and V are small, so this is a sound
choice up to moderate row lengths, and where messages are dear. The arithmetic is the ring's.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasft.attention.blocks import RowLayout
from megasft.attention.blockwise import attend_to_shares


def all_gather_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row: RowLayout,
    scale: float,
    window: int | None,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Attend to gathered shares, block by block; see ``AttentionBackend``."""
    keys, values = (gather_shares(x, row, group) for x in (key, value))
    return attend_to_shares(query, keys, values, row.steps(window), scale=scale)


def gather_shares(
    share: torch.Tensor, row: RowLayout, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Gather a tensor over the context-parallel group.

    The backward pass sums every rank's gradient of each token and returns it to its owner
    (reduce-scatter over the same group).

    Args:
        share: float [T, ...]. This rank's tokens.
        row: How many ranks share the row.
        group: The context-parallel group; not used when there is one rank.

    Returns:
        float [cp_size, T, ...], by rank.
    """
    if row.cp_size == 1:
        return share.unsqueeze(0)
    shares: torch.Tensor = _Gather.apply(share, group)  # type: ignore[no-untyped-call]
    return shares


class _Gather(Function):
    """All-gather with its gradient.

    Megatron's own asks for the current CUDA device in backward, which inside a recomputation no
    longer means the CPU (``megasft.megatron.cpu``).
    """

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        shares = share.new_empty(group.size(), *share.shape)
        # gloo corrupts non-contiguous tensors silently (torch 2.13).
        dist.all_gather_into_tensor(shares.flatten(0, 1), share.contiguous(), group=group)
        return shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_shares: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_share = torch.empty_like(grad_shares[0])
        flat = grad_shares.contiguous().flatten(0, 1)
        dist.reduce_scatter_tensor(grad_share, flat, group=ctx.group)
        return grad_share, None


def gather_row(
    share: torch.Tensor, row: RowLayout, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Gather a tensor over the context-parallel group and put it in row order.

    Args:
        share: float [T, ...]. This rank's tokens.
        row: The cut to undo.
        group: The context-parallel group; not used when there is one rank.

    Returns:
        float [T * cp_size, ...], whole row.
    """
    shares = gather_shares(share, row, group)
    return share if row.cp_size == 1 else shares.flatten(0, 1)[row.order]
