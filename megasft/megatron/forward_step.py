"""One micro-batch through the model: what Megatron's schedules call. No arithmetic here."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from megasft.loss.auxiliary import mtp_mask
from megasft.loss.loss_func import LossOutput, sft_loss
from megasft.megatron.core_attention import packed_row
from megasft.megatron.global_batch import GlobalBatches
from megasft.megatron.probe import Observer, Probe
from megasft.schema import PER_TOKEN_FIELDS, SFTBatch

LossFunc = Callable[[torch.Tensor], LossOutput]


def forward_step_func(
    args: Any,
    batches: GlobalBatches,
    observer: Observer,
    probe: Probe | None = None,
    *,
    valid_weight_scale: float = 1.0,
) -> Callable[[Iterator[Any], Any], tuple[torch.Tensor, LossFunc]]:
    """Return Megatron's ``forward_step_func`` for this run's loss.

    Args:
        args: Megatron's flags.
        batches: What the row plan knows of each global batch.
        observer: Is notified of each micro-batch.
        probe: Sees, and may replace, each training share and its loss.
        valid_weight_scale: What the loss of evaluations is multiplied by.
    """
    loss = partial(sft_loss, objective=args.megasft_loss, dft_alpha=args.megasft_dft_alpha)

    def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, LossFunc]:
        is_training = model.training
        if is_training:
            observer.begin_step()
        host_batch = next_batch(data_iterator)
        if probe is not None and is_training:
            host_batch = probe.share(host_batch)
        # Interleaved stages see each micro-batch once per chunk; it counts once.
        if is_training and not get_attr_wrapped_model(model, "vp_stage"):
            update_seqlen_stats_from_cu_seqlens(host_batch.cu_seqlens_unpadded)
        batch = _to_device(host_batch)

        def loss_func(losses: torch.Tensor) -> LossOutput:
            # Every rank of a tensor-parallel group has the same losses.
            if mpu.get_tensor_model_parallel_rank() == 0:
                observer.add(losses, batch, is_training=is_training)
            if not is_training:
                return loss(losses, batch=batch, weight_scale=valid_weight_scale)
            step = batches.now(args)
            ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
            output = loss(
                losses,
                batch=batch,
                weight_scale=step.weight_scale,
                part=1.0 / (get_num_microbatches() * ranks),
                is_empty_step=step.units == 0,
            )
            return output if probe is None else probe.loss(output, batch)

        return _losses(args, model, host_batch, batch), loss_func

    return forward_step


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> SFTBatch:
    """Return the next share, on the host; the loader added a batch dimension of 1."""
    fields = next(data_iterator)
    return SFTBatch(**{name: tensor.squeeze(0) for name, tensor in fields.items()})


def _to_device(batch: SFTBatch) -> SFTBatch:
    """Move what model and loss read token by token; boundaries and ids are read on the host."""
    device = torch.device("cuda", torch.cuda.current_device())
    moved = {n: getattr(batch, n).to(device, non_blocking=True) for n in PER_TOKEN_FIELDS}
    return batch._replace(**moved)


def _losses(args: Any, model: Any, host_batch: SFTBatch, batch: SFTBatch) -> torch.Tensor:
    """Return the model's cross entropy per token; what the next stage needs, before the last."""
    device, cp_size = batch.tokens.device, mpu.get_context_parallel_world_size()
    cp_rank = mpu.get_context_parallel_rank()
    extra = {}
    if args.mtp_num_layers:
        mask = mtp_mask(
            host_batch,
            cp_size=cp_size,
            num_layers=args.mtp_num_layers,
            num_slices=math.lcm(args.megasft_align_tokens, 2 * cp_size),
        )
        extra["loss_mask"] = mask.unsqueeze(0).to(device)
    losses: torch.Tensor = model(
        input_ids=batch.tokens.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        attention_mask=None,
        labels=batch.labels.unsqueeze(0),
        packed_seq_params=packed_row(
            host_batch.cu_seqlens, batch.position_ids, cp_rank=cp_rank, cp_size=cp_size
        ),
        **extra,
    )
    return losses
