"""Multi-token prediction's shift of a packed row by one token, all documents at once.

Megatron shifts tokens, positions, labels and mask to the left inside each document, in a Python
loop that slices by numbers it reads back from the device, and under context parallelism sends a
message per document and slice. Here the shift is one gather by indices that are made on the host,
once per row, and one exchange with each neighbour in the ring for all documents together. The
numbers are the same.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.transformer import multi_token_prediction

from megasft.attention.blocks import RowLayout
from megasft.megatron.core_attention import PackedRow


class RowShift(NamedTuple):
    """Where each token of a shard finds the token after it.

    Attributes:
        sources: int64 [T]. Index into the shard's tokens, followed by what comes from the next
            rank (D tokens) and from the previous one (D); without context parallelism by a zero.
        front: int64 [D]. First token of each document's front slice, which the previous rank needs.
        back: int64 [D]. First token of each document's back slice, which the next rank needs.
    """

    sources: torch.Tensor
    front: torch.Tensor
    back: torch.Tensor


def row_shift(layout: RowLayout) -> RowShift:
    """Return the shift of a row's shard.

    Example:
        >>> row_shift(RowLayout(borders=(0, 2, 5), cp_rank=0, cp_size=1,
        ...                     device=torch.device("cpu"))).sources.tolist()
        [1, 5, 3, 4, 5]
    """
    boundaries = np.asarray(layout.borders) // layout.cp_size
    starts, ends = boundaries[:-1], boundaries[1:]
    middles = starts + (ends - starts) // 2
    num_tokens, num_documents = int(boundaries[-1]), len(starts)
    sources = np.arange(1, num_tokens + 1)
    if layout.cp_size == 1:
        sources[ends - 1] = num_tokens
    else:
        # Slice r is followed by slice r + 1: the next rank's front, or our own back slice where the
        # two meet in the middle of a document. Slice 2 * cp_size - 1 - r is followed by the
        # previous rank's back slice, and on rank 0 by the document's end.
        documents = np.arange(num_documents)
        is_last = layout.cp_rank == layout.cp_size - 1
        sources[middles - 1] = middles if is_last else num_tokens + documents
        sources[ends - 1] = num_tokens + num_documents + documents
    indices = (torch.from_numpy(array).to(layout.device) for array in (sources, starts, middles))
    return RowShift(*indices)


def shifted(tensor: torch.Tensor, shift: RowShift, received: torch.Tensor) -> torch.Tensor:
    """Shift a shard to the left by one token.

    Args:
        tensor: [..., T].
        shift: Of the row.
        received: [..., 2 * D] from the next and the previous rank; [..., 1], 0, without ranks.

    Returns:
        [..., T], 0 at the last token of each document.
    """
    return torch.cat((tensor, received), -1).index_select(-1, shift.sources)


def replace_roll() -> None:
    """Let Megatron's multi-token prediction shift packed rows so; other input as before."""
    original = multi_token_prediction.roll_tensor
    if getattr(original, "shifts_rows", False):
        return

    def roll(
        tensor: torch.Tensor,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(packed_seq_params, PackedRow) or shifts != -1:
            rolled: tuple[torch.Tensor, torch.Tensor] = original(
                tensor, shifts, dims, cp_group, packed_seq_params
            )
            return rolled
        shift = packed_seq_params.shift(row_shift)
        result = shifted(tensor, shift, _received(tensor, shift, packed_seq_params, cp_group))
        return result, result.sum()

    roll.shifts_rows = True  # type: ignore[attr-defined]
    multi_token_prediction.roll_tensor = roll


def _received(tensor: torch.Tensor, shift: RowShift, row: PackedRow, group: Any) -> torch.Tensor:
    """Exchange the first tokens of slices with both neighbours in the context-parallel ``group``.

    Not a ring: rank 0 has no previous rank, and what it lacks there is 0.
    """
    rank, size = row.layout.cp_rank, row.layout.cp_size
    if size == 1:
        return tensor.new_zeros((*tensor.shape[:-1], 1))
    front, back = (tensor.index_select(-1, first) for first in (shift.front, shift.back))
    from_next, from_previous = torch.zeros_like(front), torch.zeros_like(back)
    send, receive = torch.distributed.isend, torch.distributed.irecv
    peers = torch.distributed.get_process_group_ranks(group)
    messages = []
    if rank > 0:
        previous = peers[rank - 1]
        messages += [(send, front, previous), (receive, from_previous, previous)]
    if rank < size - 1:
        following = peers[rank + 1]
        messages += [(receive, from_next, following), (send, back, following)]
    pending = [
        torch.distributed.P2POp(operation, buffer, peer, group)
        for operation, buffer, peer in messages
    ]
    for request in torch.distributed.batch_isend_irecv(pending):
        request.wait()
    return torch.cat((from_next, from_previous), -1)
