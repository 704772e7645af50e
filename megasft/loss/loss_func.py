"""Per-token losses of one share to the 3-tuple Megatron sums: loss, units, metrics.

The contract of ``--calculate-per-token-loss`` (Megatron-Core 0.19, schedules and
finalize_model_grads): losses and gradients are summed over micro-batches and over data- and
context-parallel ranks, units likewise, as int32, and everything is divided once. So this function
divides by nothing and talks to nobody. A share without labels returns zeros, whose gradient is
zero: a legal no-op.

What is reported as the loss is what is optimised, weights of turns and DFT counted; the token loss
is plain cross entropy.
"""

from typing import NamedTuple

import torch

from megasft import metrics
from megasft.loss.objectives import OBJECTIVES, has_label
from megasft.loss.reweight import dft_weights
from megasft.schema import SFTBatch


class LossOutput(NamedTuple):
    """What Megatron's schedule expects of a loss function.

    Attributes:
        loss_sum: float32 []. Weighted cross entropy, summed over this share.
        units: int32 []. Units this share counts.
        reported: Name to float32 [2], see ``megasft.metrics``.
    """

    loss_sum: torch.Tensor
    units: torch.Tensor
    reported: dict[str, torch.Tensor]


def sft_loss(
    losses: torch.Tensor,
    *,
    batch: SFTBatch,
    objective: str = "turn",
    dft_alpha: float = 0.0,
    weight_scale: float = 1.0,
    part: float | None = None,
    is_empty_step: bool = False,
) -> LossOutput:
    """Weight and sum the losses of one share of a micro-batch.

    Args:
        losses: float [1, T] or [T]. Cross entropy per token, from the model; may hold anything,
            nan included, where there is no label.
        batch: The share these losses belong to, shifted.
        objective: A name of ``OBJECTIVES``.
        dft_alpha: Strength of DFT; 0 switches it off.
        weight_scale: Units over the sum of their weights, of the global batch, where weights are
            normalized.
        part: What fraction of a step this share is (1 / (micro-batches x dp x cp)), for totals;
            ``None`` leaves totals out, as validation does.
        is_empty_step: The whole global batch has no label. Means are reported as 0 over 1 then,
            because Megatron divides what is reported without a clamp.

    Returns:
        Sums over this share; see ``LossOutput``.

    Example:
        Two turns of 1 and 2 labels: 3.0 + (1.0 + 2.0) / 2 = 4.5 over 2 turns. If the second one has
        a weight of 0.5: 3.0 + 0.5 x 1.5 = 3.75 over 2 turns; normalized, times 2 / 1.5.
    """
    chosen = OBJECTIVES[objective]
    labelled = has_label(batch)
    # Padding may hold nan, and 0 * nan is nan: select, do not multiply.
    ce = torch.where(labelled, losses.reshape(-1).float(), 0.0)
    weights = chosen.weights(batch)
    if dft_alpha:
        weights = weights * dft_weights(ce, alpha=dft_alpha)
    loss_sum = (ce * weights).sum()
    if weight_scale != 1.0:
        loss_sum = loss_sum * weight_scale
    units = chosen.units(batch).sum(dtype=torch.int32)

    detached, num_labels = ce.detach(), labelled.sum().float()
    reported = {
        metrics.LOSS: torch.stack([loss_sum.detach(), units.float()]),
        metrics.TOKEN_LOSS: torch.stack([detached.sum(), num_labels]),
    }
    if dft_alpha:
        p_correct = torch.where(labelled, torch.exp(-detached), 0.0).sum()
        reported[metrics.P_CORRECT] = torch.stack([p_correct, num_labels])
    if part is not None:
        one = torch.full_like(num_labels, part)
        if is_empty_step:
            reported = {name: torch.stack([mean[0], one]) for name, mean in reported.items()}
        for name, total in (
            (metrics.TURNS, batch.ends_turn.sum().float()),
            (metrics.SAMPLES, batch.ends_sample.sum().float()),
            (metrics.TOKENS, num_labels),
        ):
            reported[name] = torch.stack([total, one])
    return LossOutput(loss_sum, units, reported)
