"""Runs the real training entry point once per layout in one process group, and records what it did.

The first step gives the loss and all gradients. The parameters are those its update has left: seen
when a second step's gradients are ready, or after a run of one step.

Usage: torchrun --nproc-per-node N -m megasft.proof.worker JOBS.json, a list of objects: ``flags``;
``defect``, a name of ``DEFECTS`` or null; ``output``, the file that rank 0 writes.
"""

from pathlib import Path
from typing import Any

import psutil
import torch

from megasft.errors import MegasftError
from megasft.loss.loss_func import LossOutput
from megasft.megatron import worker
from megasft.megatron.capture import gather_gradient_shards, sum_over_ranks, whole_tensors
from megasft.pretrain_sft import run
from megasft.proof.defects import DEFECTS, Defect
from megasft.schema import SFTBatch


class Recorder:
    """Writes loss and gradients of the first step and the parameters after it; see ``Probe``.

    Args:
        path: File that rank 0 writes.
        defect: What to break, if anything.
    """

    def __init__(self, path: Path, defect: Defect | None = None) -> None:
        self.path, self.defect = path, defect
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.step = 0
        self.model: list[Any] = []
        self.record: dict[str, Any] = {}

    def share(self, batch: SFTBatch) -> SFTBatch:
        """Break the share, when the defect is one of data."""
        return self.defect.share(batch) if self.defect else batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        """Break the loss, when the defect is one of counting; and sum it up."""
        if self.defect:
            output = self.defect.loss(output, batch)
        self.loss_sum += output.loss_sum.detach().double().cpu()
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        """Record a step."""
        self.step += 1
        loss = sum_over_ranks(self.loss_sum)
        self.loss_sum.zero_()
        if self.step == 1:
            gather_gradient_shards(model)
            gradients = whole_tensors(model, lambda p: p.main_grad)  # type: ignore[attr-defined]
            self.record = {"loss": loss / max(units, 1), "units": units}
            self.record["gradients"] = gradients
            self.model = model
        elif self.step == 2:
            self.finish()

    def finish(self) -> None:
        """Record the parameters after the first step, unless that is done; and write the file."""
        if not self.model:
            return
        self.record["parameters"] = whole_tensors(self.model, lambda p: p)
        self.record["threads"] = psutil.Process().num_threads()
        self.model = []
        if torch.distributed.get_rank() == 0:
            worker.write_whole(self.record, self.path)


def record(job: dict[str, Any]) -> None:
    """Do one run, and write what is recorded of it."""
    recorder = Recorder(Path(job["output"]), DEFECTS.get(job["defect"]))
    run(job["flags"], probe=recorder)
    recorder.finish()


if __name__ == "__main__":
    worker.work(record, stays_after=MegasftError)
