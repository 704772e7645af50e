"""Puts the pieces of a model, cut over all ranks, together again as whole tensors on rank 0.

Megatron's own description of who holds which piece is used (``sharded_state_dict``, the one its
checkpoints are written by), with a value of our choice in the place of each parameter: its gradient
or the parameter itself. So names and shapes are those of a checkpoint, whatever the layout, and the
conversion to Hugging Face's names applies to gradients as well. Nothing is written to disk.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

ValueOf = Callable[[torch.nn.Parameter], torch.Tensor]


class Piece(NamedTuple):
    """One rank's part of a whole tensor."""

    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    data: torch.Tensor


def whole_tensors(chunks: list[Any], value_of: ValueOf) -> dict[str, torch.Tensor]:
    """Gather one value per parameter from all ranks; a collective over the world.

    Args:
        chunks: This rank's model chunks, wrapped by Megatron or not.
        value_of: Parameter to a tensor of its shape.

    Returns:
        On rank 0, whole tensors by their checkpoint names, float32 on the CPU; elsewhere nothing.
    """
    pieces = [piece for chunk in chunks for piece in _pieces(chunk, value_of)]
    world = torch.distributed.get_world_size()
    is_first = torch.distributed.get_rank() == 0
    gathered: list[Any] | None = [None] * world if is_first else None
    torch.distributed.gather_object(pieces, gathered, dst=0)
    return {} if gathered is None else _join([p for rank in gathered for p in rank])


def _pieces(chunk: Any, value_of: ValueOf) -> Iterator[Piece]:
    """Yield this rank's pieces, without copies that another rank contributes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        apply_factories,
        is_main_replica,
    )
    from megatron.core.dist_checkpointing.utils import extract_sharded_base
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata
    from megatron.training.global_vars import get_args

    model = unwrap_model(chunk)
    values = {p.data_ptr(): value_of(p) for p in model.parameters()}
    metadata = _build_sharded_state_dict_metadata(get_args())
    sharded, _ = extract_sharded_base(model.sharded_state_dict(metadata=metadata))
    kept = {}
    for i, leaf in enumerate(nested_values(sharded)):
        if isinstance(leaf.data, torch.Tensor) and leaf.data.data_ptr() in values:
            # Views of a parameter (tied embeddings on the last stage) keep their own shape.
            leaf.data = values[leaf.data.data_ptr()].view(leaf.data.shape)
            if isinstance(leaf, ShardedTensor):
                leaf.dtype = leaf.data.dtype
            kept[i] = leaf
    apply_factories(kept)
    for leaf in nested_values(kept):
        if is_main_replica(leaf.replica_id):
            data = leaf.data.detach().float().cpu().clone()
            yield Piece(leaf.key, leaf.global_shape, leaf.global_offset, data)


def _join(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """Lay pieces into whole tensors.

    Places that no piece covers stay nan, so that a missing piece fails every comparison.
    """
    whole: dict[str, torch.Tensor] = {}
    for piece in pieces:
        target = whole.setdefault(piece.key, torch.full(piece.global_shape, float("nan")))
        # Axes that were put before the tensor's own (layers, experts) have no length in the piece.
        num_before = len(piece.global_shape) - piece.data.dim()
        where: list[int | slice] = list(piece.global_offset[:num_before])
        for start, size in zip(piece.global_offset[num_before:], piece.data.shape, strict=True):
            where.append(slice(start, start + size))
        target[tuple(where)] = piece.data
    return whole


def sum_over_ranks(loss: torch.Tensor) -> float:
    """Sum a loss over all ranks; tensor-parallel ranks have the same one, which counts once.

    Args:
        loss: float64 []. This rank's; left as it is.
    """
    from megatron.core import mpu

    is_counted = mpu.get_tensor_model_parallel_rank() == 0
    total = loss.clone() if is_counted else torch.zeros_like(loss)
    total = total.to(torch.device("cuda", torch.cuda.current_device()))
    torch.distributed.all_reduce(total)
    return float(total)


def gather_gradient_shards(chunks: list[Any]) -> None:
    """Complete the gradient buffers of the distributed optimizer, of which each rank has a part.

    After the reduce-scatter a rank's buffer is right in its own part only, and the optimizer reads
    no other, so filling in the rest changes nothing in the run.
    """
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.ddp_config.use_distributed_optimizer:
                continue
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                mine = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)
