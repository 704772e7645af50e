"""Losses per conversation of a training step, reduced together with the other sums."""

import logging
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megasft.loss.per_sample import SAMPLE_COLUMNS, add_by_sample
from megasft.megatron.global_batch import GlobalBatches
from megasft.report.spikes import Spike, SpikeFile, highest_first
from megasft.schema import SFTBatch
from megasft.training.datasets import PlannedStore
from megasft.training.report_arguments import log_folder

logger = logging.getLogger(__name__)


class Spikes:
    """Sums losses per conversation on each rank, and keeps those of spikes on rank 0.

    Args:
        args: Megatron's flags.
        train: Store and plan of the run.
        batches: What the row plan knows of each global batch.
    """

    def __init__(self, args: Any, train: PlannedStore, batches: GlobalBatches) -> None:
        self.args, self.plan, self.batches = args, train.plan, batches
        self.table: torch.Tensor | None = None
        self.first_of_row: dict[int, int] = {}
        folder = log_folder(args)
        self.file = None
        if args.rank == 0 and folder is not None:
            stores = [str(Path(path).absolute()) for path in args.megasft_data]
            self.file = SpikeFile(folder, stores=stores, factor=args.megasft_spikes)

    def add(self, losses: torch.Tensor, batch: SFTBatch) -> None:
        """Add the losses of a micro-batch."""
        table = self._table()
        documents: list[int] = []
        boundaries = batch.cu_seqlens.tolist()
        for n, row in enumerate(batch.row_ids.tolist(), start=1):
            first = self.first_of_row[row]
            documents += range(first, first + len(self.plan.rows[row]))
            # The row's tail pad is a document, too.
            if boundaries[len(documents)] < n * self.plan.row_tokens:
                documents.append(-1)
        add_by_sample(table, losses, batch, samples=documents)

    def sums(self) -> torch.Tensor:
        """Return this rank's sums of the step, to be reduced, and start the next step."""
        sums, self.table = self._table(), None
        return sums

    def stepped(self, step: int, loss: float, reduced: torch.Tensor) -> None:
        """Keep the conversations of a step whose loss rose, and say so.

        Args:
            step: From 1.
            loss: What is optimised.
            reduced: float64 [samples + 1, 2]. Sums of all ranks.
        """
        if self.file is None:
            return
        try:
            self.file.begin(step)
            median = self.file.median_if_spike(loss)
            if median is None:
                return
            rows = self.batches.now(self.args).rows
            samples = [int(i) for row in rows for i in self.plan.rows[row]]
            by_loss = highest_first(samples, reduced[:-1].tolist())
            self.file.write(Spike(step, loss, median, self.file.stores, by_loss))
        except OSError as error:
            self.file = None
            logger.warning("%s; no more spikes are kept, training goes on", error)
            return
        logger.warning(
            "step %d: loss %.4f is %.2f times the median of the steps before, %.4f; "
            "`megasft spikes %s --step %d` lists its conversations by loss",
            *(step, loss, loss / median, median, log_folder(self.args), step),
        )

    def _table(self) -> torch.Tensor:
        """Return the table of the step: the samples of its rows, in the order of the run."""
        if self.table is None:
            rows = self.batches.now(self.args).rows
            starts = list(accumulate((len(self.plan.rows[row]) for row in rows), initial=0))
            # A row that comes twice, at the edge of an epoch, is summed twice in one place: its
            # losses per label stay what they are.
            self.first_of_row = dict(zip(rows, starts, strict=False))
            device = torch.device("cuda", torch.cuda.current_device())
            size = (starts[-1] + 1, len(SAMPLE_COLUMNS))
            self.table = torch.zeros(size, dtype=torch.float64, device=device)
        return self.table
