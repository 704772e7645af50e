"""Keeps side losses (MoE balancing, router z-loss, MTP) in proportion to the main loss.

Megatron adds a side loss as a gradient, multiplied by a token count, and trusts the final division
to be by tokens. When the loss is a mean over turns it divides by turns, and a row of 131,072 tokens
with 150 turns would get its balancing loss 874 times too strong. Here is what undoes that: with
``U`` units, ``L`` labels and ``P`` positions (padding counted) in the global batch, all known
beforehand from the row plan, and ``M`` micro-batches over all data-parallel ranks,

    MoE losses   (Σ_mb P / M · aux_mb) · (U / P) / U   =  Σ_mb aux_mb / M
    MTP loss     (Σ ce_mtp) · (U / L) / U              =  Σ ce_mtp / L

so the side losses' gradient is the same whichever objective is chosen, and whatever turns weigh:
weights change no count, and these losses know of none.

Padding is routed and balanced like any token. Megatron 0.19 can mask it, but then multiplies each
rank's part of the balancing loss by that rank's count of true tokens, which depends on the cut
(measured: 9 % of a gradient at CP 2); without the mask every rank has as many. Rows packed well are
padding by a fraction of a percent.

Megatron renormalizes MTP on each rank by the labels that moved over a context-parallel seam or out
of a document. No scale undoes that, so labels next to any possible seam are left out of the MTP
loss: a handful per document, and the same ones on every layout.

Source: the switch load-balancing loss of arXiv 2101.03961, the router z-loss of arXiv 2202.08906,
multi-token prediction of arXiv 2412.19437, each as Megatron-Core 0.19 scales it (router.py,
multi_token_prediction.py).
"""

import torch

from megasft.schema import SFTBatch


def side_loss_scale(*, units: int, counted: int) -> float:
    """Return what turns a division by units into one by what a side loss counts.

    Args:
        units: Units of the global batch; Megatron divides by at least 1.
        counted: Positions or labels of the global batch.

    Example:
        >>> side_loss_scale(units=150, counted=131072) * 874 > 1.0
        True
    """
    return max(units, 1) / max(counted, 1)


def mtp_mask(batch: SFTBatch, *, cp_size: int, num_layers: int, num_slices: int) -> torch.Tensor:
    """Return int64 [T]: 1 at labels the multi-token prediction loss may move to earlier positions.

    Layer ``k`` of MTP predicts, at position ``t``, the label of position ``t + k``. Labels in the
    first ``num_layers`` positions of a slice would come from another slice, so they are left out.

    Args:
        batch: One share, on the host.
        cp_size: Ranks that share a row.
        num_layers: Depth of MTP.
        num_slices: Slices of each document that layouts may cut; a multiple of ``2 * cp_size``.
    """
    lengths = torch.diff(batch.cu_seqlens)
    slice_tokens = torch.repeat_interleave(lengths // num_slices, lengths // cp_size)
    place = batch.position_ids % slice_tokens
    return ((batch.turn_tokens > 0) & (place >= num_layers)).long()
