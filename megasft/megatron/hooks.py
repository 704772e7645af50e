"""Fills the hooks Megatron offers on its config: gradient finalization and side-loss scales."""

from collections.abc import Callable
from typing import Any

import torch

from megasft.loss.auxiliary import side_loss_scale
from megasft.megatron.global_batch import GlobalBatches
from megasft.megatron.probe import Observer, Probe


def install(
    config: Any, args: Any, batches: GlobalBatches, observer: Observer, probe: Probe | None = None
) -> None:
    """Set the hooks of a run.

    Args:
        config: Megatron's ``TransformerConfig``.
        args: Megatron's flags.
        batches: What the row plan knows of each global batch.
        observer: Is notified of the final gradients of each step.
        probe: Sees the final gradients of each step.
    """
    config.finalize_model_grads_func = _finalize(config, observer, probe)
    config.moe_grad_scale_func = _scale(config, args, batches, counted="positions")
    config.mtp_grad_scale_func = _scale(config, args, batches, counted="labels")


def _finalize(config: Any, observer: Observer, probe: Probe | None) -> Callable[..., None]:
    """Return Megatron's own finalization, followed by the observer and the probe."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
        finalize_model_grads(model, num_tokens, **groups)
        assert num_tokens is not None, "--calculate-per-token-loss is checked before the start"
        observer.finalize(config, num_tokens)
        if probe is not None:
            probe.gradients(model, int(num_tokens.item()))

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
