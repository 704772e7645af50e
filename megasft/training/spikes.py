"""Losses per conversation of a training step, gathered on the road of the other sums.

The rows of a micro-batch are not told by the batch; they follow from Megatron's sampler
(``--dataloader-type single``: micro-batch ``m`` of data-parallel rank ``d`` starts at position
``(m * dp_size + d) * micro_batch_size`` of the global batch) and the order the dataset reads.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megasft.loss.per_sample import SampleSums
from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.balance import BatchShape
from megasft.report.spikes import Spike, SpikeFile, dearest_first
from megasft.schema import SFTBatch
from megasft.training import row_order
from megasft.training.datasets import PlannedStore
from megasft.training.report_arguments import log_folder


class Spikes:
    """Sums losses per conversation on each rank, and keeps those of spikes on rank 0.

    Args:
        args: Megatron's flags.
        train: Store and plan of the run.
        batches: What the row plan knows of each global batch.
    """

    def __init__(self, args: Any, train: PlannedStore, batches: GlobalBatches) -> None:
        self.args, self.plan, self.batches = args, train.plan, batches
        self.order: Any = None
        self.table: SampleSums | None = None
        self.rows: Sequence[int] = ()
        self.first_of_row: dict[int, int] = {}
        self.num_added = 0
        folder = log_folder(args)
        self.file = None
        if args.rank == 0 and folder is not None:
            stores = [str(Path(path).absolute()) for path in args.megasft_data]
            self.file = SpikeFile(folder, stores=stores, factor=args.megasft_spikes)

    def add(self, losses: torch.Tensor, batch: SFTBatch) -> None:
        """Add the losses of a micro-batch; they come in the order of the step."""
        from megatron.core import mpu

        self._begin()
        assert self.table is not None
        size, dp_size = self.args.micro_batch_size, mpu.get_data_parallel_world_size()
        dp_rank, cp_size = mpu.get_data_parallel_rank(), mpu.get_context_parallel_world_size()
        first = int(self.args.consumed_train_samples) + (
            (self.num_added * dp_size + dp_rank) * size
        )
        self.num_added += 1
        rows = [int(self.order[k]) for k in range(first, first + size)]
        table_rows: list[int] = []
        borders = batch.cu_seqlens.tolist()
        for n, row in enumerate(rows, start=1):
            start = self.first_of_row[row]
            table_rows += range(start, start + len(self.plan.rows[row]))
            # The row's tail pad is a document, too.
            if borders[len(table_rows)] < n * self.plan.row_tokens:
                table_rows.append(-1)
        self.table.add(losses, batch, samples=table_rows, cp_size=cp_size)

    def sums(self) -> torch.Tensor:
        """Return this rank's sums of the step, to be reduced, and begin anew."""
        self._begin()
        assert self.table is not None
        sums, self.table, self.num_added = self.table.sums, None, 0
        return sums

    def stepped(self, step: int, loss: float, reduced: torch.Tensor) -> float | None:
        """Keep the step's conversations when it is a spike; return the median before it then.

        Args:
            step: From 1.
            loss: What is optimised.
            reduced: float64 [samples + 1, 2]. Sums of all ranks.
        """
        if self.file is None:
            return None
        self.file.begin(step)
        median = self.file.median_if_spike(loss)
        if median is not None:
            samples = [int(i) for row in self.rows for i in self.plan.rows[row]]
            dearest = dearest_first(samples, reduced[:-1].tolist())
            self.file.write(Spike(step, loss, median, self.file.stores, dearest))
        return median

    def _begin(self) -> None:
        """Lay out the table of a step: the samples of its rows, in the order of the run."""
        if self.table is not None:
            return
        if self.order is None:
            self.order = self._order()
        self.rows = self.batches.now(self.args).rows
        starts = list(accumulate((len(self.plan.rows[row]) for row in self.rows), initial=0))
        # A row that comes twice, at the edge of an epoch, is summed twice in one place: its losses
        # per label stay what they are.
        self.first_of_row = dict(zip(self.rows, starts, strict=False))
        device = torch.device("cuda", torch.cuda.current_device())
        self.table = SampleSums(starts[-1], device=device)

    def _order(self) -> Any:
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        shape = BatchShape(
            global_batch_size=get_current_running_global_batch_size(),
            dp_size=mpu.get_data_parallel_world_size(),
            micro_batch_size=self.args.micro_batch_size,
        )
        return row_order.training_order(self.args, self.plan, shape)
