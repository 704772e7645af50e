"""Context parallelism by gathering all keys and values of the row before attending.

Each rank keeps its own queries and asks for everybody's keys: two collectives per layer forward,
two backward, and K and V of the whole row in memory, against the ring's point-to-point messages and
one share at a time. With grouped-query attention K and V are small, so this is a sound choice up to
moderate row lengths, and the simplest to trust. The ring is the next backend.
"""

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megasft.cp_layout import zigzag_positions


def row_order(borders: tuple[int, ...], *, cp_size: int) -> torch.Tensor:
    """Return where each row position lies in the shares laid end to end.

    Args:
        borders: Aligned document borders of the whole row; starts at 0.
        cp_size: Ranks that share the row.

    Returns:
        int64 [T of the whole row]: ``gathered[order]`` is in row order.

    Example:
        >>> row_order((0, 8), cp_size=2).tolist()      # shares: 0 1 6 7 | 2 3 4 5
        [0, 1, 4, 5, 6, 7, 2, 3]
    """
    cu_seqlens = np.asarray(borders)
    shares = [zigzag_positions(cu_seqlens, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    return torch.from_numpy(np.argsort(np.concatenate(shares)))


def gather_row(
    share: torch.Tensor, order: torch.Tensor, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Gather a tensor over the context-parallel group and put it in row order.

    The backward pass sums every rank's gradient of each token and returns it to its owner
    (reduce-scatter over the same group).

    Args:
        share: float [T / cp_size, ...]. This rank's tokens.
        order: From ``row_order``, on the share's device.
        group: The context-parallel group.

    Returns:
        float [T, ...], whole row.
    """
    # gloo corrupts non-contiguous tensors silently (torch 2.13).
    gathered: torch.Tensor = gather_from_sequence_parallel_region(share.contiguous(), group=group)
    return gathered[order]
