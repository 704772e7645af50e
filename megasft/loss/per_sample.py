"""Sums of a step's losses for each sample, one row of two numbers per sample of the global batch.

Which samples a global batch has is known from the row plan on every rank, so the table has the same
size everywhere, and shares and ranks add up in one all-reduce, as the breakdown does. Documents
keep their order in a share and give every rank equally many tokens, so the share of a document is
found by its borders alone.
"""

from collections.abc import Sequence
from typing import Final

import torch

from megasft.loss.objectives import has_label
from megasft.schema import SFTBatch

SAMPLE_COLUMNS: Final = ("ce", "labels")


class SampleSums:
    """The table of a step.

    Args:
        num_samples: Samples of the global batch.
        device: Where losses are.

    Attributes:
        sums: float64 [num_samples + 1, 2]. The last row takes what is of no sample.
    """

    def __init__(self, num_samples: int, *, device: torch.device | str = "cpu") -> None:
        size = (num_samples + 1, len(SAMPLE_COLUMNS))
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(
        self, losses: torch.Tensor, batch: SFTBatch, *, samples: Sequence[int], cp_size: int
    ) -> None:
        """Add the losses of one share of a micro-batch.

        Args:
            losses: float [1, T] or [T]. Cross entropy per token; anything where there is no label.
            batch: The share, on the device of the losses; its borders are on the host.
            samples: Row of the table for each document, -1 for padding.
            cp_size: Ranks that share one row.
        """
        labelled = has_label(batch)
        ce = torch.where(labelled, losses.detach().reshape(-1).double(), 0.0)
        values = torch.stack([ce, labelled.double()], dim=1)
        device = self.sums.device
        borders = (batch.cu_seqlens[1:] // cp_size).to(device, non_blocking=True)
        places = torch.arange(len(ce), dtype=borders.dtype, device=device)
        document = torch.bucketize(places, borders, right=True)
        row = torch.tensor(samples).to(device, non_blocking=True)[document]
        self.sums.index_add_(0, torch.where(row < 0, len(self.sums) - 1, row), values)
