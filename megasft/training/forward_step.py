"""One micro-batch through the model: what Megatron's schedules call. No arithmetic here."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from megasft.attention.core_attention import packed_row
from megasft.loss.loss_func import LossOutput, sft_loss
from megasft.schema import PER_TOKEN_FIELDS, SFTBatch

LossFunc = Callable[[torch.Tensor], LossOutput]


def forward_step_func(args: Any) -> Callable[[Iterator[Any], Any], tuple[torch.Tensor, LossFunc]]:
    """Return Megatron's ``forward_step_func`` for this run's loss."""

    def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, LossFunc]:
        batch = next_batch(data_iterator)
        cp_size = mpu.get_context_parallel_world_size()
        device = torch.device("cuda", torch.cuda.current_device())
        row = packed_row(
            batch.cu_seqlens,
            device=device,
            cp_rank=mpu.get_context_parallel_rank(),
            cp_size=cp_size,
        )
        # Interleaved stages see each micro-batch once per chunk; it counts once.
        if model.training and not get_attr_wrapped_model(model, "vp_stage"):
            update_seqlen_stats_from_cu_seqlens(batch.cu_seqlens_unpadded)
        batch = _to_device(batch, device)
        losses = model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            labels=batch.labels.unsqueeze(0),
            packed_seq_params=row,
        )
        parts = get_num_microbatches() * mpu.get_data_parallel_world_size() * cp_size
        loss_func = partial(
            sft_loss,
            batch=batch,
            objective=args.megasft_loss,
            dft_alpha=args.megasft_dft_alpha,
            part=1.0 / parts if model.training else None,
        )
        return losses, loss_func

    return forward_step


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> SFTBatch:
    """Return the next share, on the host; the loader added a batch dimension of 1."""
    fields = next(data_iterator)
    return SFTBatch(**{name: fields[name].squeeze(0) for name in SFTBatch._fields})


def _to_device(batch: SFTBatch, device: torch.device) -> SFTBatch:
    """Move what the model and the loss read; ``PackedRow`` has the borders where they are read."""
    moved = {n: getattr(batch, n).to(device, non_blocking=True) for n in PER_TOKEN_FIELDS}
    return batch._replace(**moved)
