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
from megasft.megatron.probe import Probe
from megasft.schema import PER_TOKEN_FIELDS, SFTBatch
from megasft.training.report import Report
from megasft.training.validation import loss_of_each_set, reported_names

LossFunc = Callable[[torch.Tensor], LossOutput]


def forward_step_func(
    args: Any, batches: GlobalBatches, report: Report, probe: Probe | None = None
) -> Callable[[Iterator[Any], Any], tuple[torch.Tensor, LossFunc]]:
    """Return Megatron's ``forward_step_func`` for this run's loss.

    Args:
        args: Megatron's flags.
        batches: What the row plan knows of each global batch.
        report: Gathers what is reported of the losses.
        probe: Sees, and may replace, each training share and its loss.
    """
    names = reported_names(args.megasft_valid_data)

    def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, LossFunc]:
        if model.training:
            report.begin_step()
        batch, set_of_row = next_batch(data_iterator)
        if probe is not None and model.training:
            batch = probe.share(batch)
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
        masks = _mask_of_mtp(args, batch, cp_size=cp_size)
        batch = _to_device(batch, device)
        losses = model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            labels=batch.labels.unsqueeze(0),
            packed_seq_params=row,
            **{name: mask.unsqueeze(0).to(device) for name, mask in masks.items()},
        )
        loss = partial(sft_loss, objective=args.megasft_loss, dft_alpha=args.megasft_dft_alpha)
        gather = partial(report.add, batch=batch, is_training=model.training, set_of_row=set_of_row)
        if model.training:
            loss_func = _training_loss(args, partial(loss, batch=batch), batch, batches, probe)
        elif set_of_row is not None:
            sets = dict(zip(names, report.scales.each, strict=True))
            loss = partial(loss, weight_scale=report.scales.together)
            loss_func = loss_of_each_set(loss, batch, set_of_row=set_of_row, sets=sets)
        else:
            loss_func = partial(loss, batch=batch, weight_scale=report.scales.together)
        return losses, _gathered(loss_func, gather)

    return forward_step


def _gathered(loss_func: LossFunc, gather: Callable[[torch.Tensor], None]) -> LossFunc:
    """Return the loss function, which also hands its losses to the report."""

    def gathered_loss(losses: torch.Tensor) -> LossOutput:
        gather(losses)
        return loss_func(losses)

    return gathered_loss


def _training_loss(
    args: Any,
    loss: Callable[..., LossOutput],
    batch: SFTBatch,
    batches: GlobalBatches,
    probe: Probe | None,
) -> LossFunc:
    """Return the loss of one share, with what only a training step knows."""
    ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
    step = batches.now(args)
    loss = partial(
        loss,
        weight_scale=step.weight_scale,
        part=1.0 / (get_num_microbatches() * ranks),
        is_empty_step=step.units == 0,
    )
    return loss if probe is None else lambda losses: probe.loss(loss(losses), batch)


def _mask_of_mtp(args: Any, batch: SFTBatch, *, cp_size: int) -> dict[str, torch.Tensor]:
    """Return the labels multi-token prediction learns; nothing without it."""
    if not args.mtp_num_layers:
        return {}
    mask = mtp_mask(
        batch,
        cp_size=cp_size,
        num_layers=args.mtp_num_layers,
        num_slices=math.lcm(args.megasft_align_tokens, 2 * cp_size),
    )
    return {"loss_mask": mask}


def next_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]],
) -> tuple[SFTBatch, torch.Tensor | None]:
    """Return the next share, on the host, and with several validation sets the set of each row.

    The loader added a batch dimension of 1.
    """
    fields = {name: tensor.squeeze(0) for name, tensor in next(data_iterator).items()}
    set_of_row = fields.pop("set_of_row", None)
    return SFTBatch(**fields), set_of_row


def _to_device(batch: SFTBatch, device: torch.device) -> SFTBatch:
    """Move what the model and the loss read; ``PackedRow`` has the borders where they are read."""
    moved = {n: getattr(batch, n).to(device, non_blocking=True) for n in PER_TOKEN_FIELDS}
    return batch._replace(**moved)
