"""Sums of losses for each sample, one row of two numbers per sample of the global batch.

Which samples a global batch has is known from the row plan on every rank, so the table has the same
size everywhere, and shares and ranks add up in one all-reduce, as the breakdown does. Documents
keep their order in a share and give every rank equally many tokens, so the share of a document is
found by its boundaries alone.
"""

from collections.abc import Sequence
from typing import Final

import torch

from megasft.loss.objectives import has_label
from megasft.schema import SFTBatch

SAMPLE_COLUMNS: Final = ("ce", "labels")


def add_by_sample(
    sums: torch.Tensor, losses: torch.Tensor, batch: SFTBatch, *, samples: Sequence[int]
) -> None:
    """Add the losses of one share of a micro-batch to a table.

    Args:
        sums: float64 [samples + 1, 2]. The table, ``SAMPLE_COLUMNS``; its last row takes what is of
            no sample.
        losses: float [1, T] or [T]. Cross entropy per token; anything where there is no label.
        batch: The share, on the device of the losses; its boundaries are on the host.
        samples: Row of the table for each document, -1 for padding.
    """
    labelled = has_label(batch)
    ce = torch.where(labelled, losses.detach().reshape(-1).double(), 0.0)
    values = torch.stack([ce, labelled.double()], dim=1)
    # Boundaries are those of the whole micro-batch, of which a share has one part in cp_size.
    cp_size = int(batch.cu_seqlens[-1]) // len(ce)
    ends = (batch.cu_seqlens[1:] // cp_size).to(sums.device, non_blocking=True)
    places = torch.arange(len(ce), dtype=ends.dtype, device=sums.device)
    document = torch.bucketize(places, ends, right=True)
    row = torch.tensor(samples).to(sums.device, non_blocking=True)[document]
    sums.index_add_(0, torch.where(row < 0, len(sums) - 1, row), values)
