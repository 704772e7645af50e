"""Fills the hooks Megatron offers on its config: gradient finalization and side-loss scales."""

from collections.abc import Callable
from typing import Any

import torch

from megasft.loss.auxiliary import side_loss_scale
from megasft.megatron.global_batch import GlobalBatches
from megasft.megatron.probe import Probe
from megasft.training.audit import audit
from megasft.training.report import Report


def install(
    config: Any, args: Any, batches: GlobalBatches, report: Report, probe: Probe | None = None
) -> None:
    """Set the hooks of a run.

    Args:
        config: Megatron's ``TransformerConfig``.
        args: Megatron's flags.
        batches: What the row plan knows of each global batch.
        report: What the run reports of each step.
        probe: Sees the final gradients of each step.
    """
    config.finalize_model_grads_func = _finalize(config, args, batches, report, probe)
    config.moe_grad_scale_func = _scale(config, args, batches, counted="positions")
    config.mtp_grad_scale_func = _scale(config, args, batches, counted="labels")


def _finalize(
    config: Any, args: Any, batches: GlobalBatches, report: Report, probe: Probe | None
) -> Callable[..., None]:
    """Return Megatron's own finalization, followed by the report, the audit and the probe."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
        finalize_model_grads(model, num_tokens, **groups)
        report.finalize(config)
        report.keeper.end_step()
        assert num_tokens is not None, "--calculate-per-token-loss is checked before the start"
        if args.megasft_no_audit and probe is None:
            return
        units = int(num_tokens.item())
        if not args.megasft_no_audit:
            audit(
                step=args.curr_iteration + 1,
                reduced=units,
                batch=batches.now(args),
                objective=args.megasft_loss,
            )
        if probe is not None:
            probe.gradients(model, units)

    return finalize


def _scale(
    config: Any, args: Any, batches: GlobalBatches, *, counted: str
) -> Callable[[], torch.Tensor]:
    """Return a hook Megatron calls for the factor of a side loss, in each micro-batch."""

    def scale() -> torch.Tensor:
        batch = batches.now(args)
        factor = side_loss_scale(units=batch.units, counted=getattr(batch, counted))
        device = torch.device("cuda", torch.cuda.current_device())
        one = torch.ones(1, device=device)
        # fp16 training scales every loss; the hook replaces Megatron's own use of it.
        loss_scale = one if config.grad_scale_func is None else config.grad_scale_func(one)
        return loss_scale * factor

    return scale
