"""Runs the training entry point, notes which tokens each rank trains, and dies where it is told to.

Usage: torchrun --nproc-per-node N -m tests.megatron.resume_worker RUNS.json, a list of objects:
``flags``; ``record``, a folder for what is noted; ``dies_in``, the step in which every rank kills
itself with SIGKILL, or null.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from megasft.loss.loss_func import LossOutput
from megasft.megatron.worker import forget
from megasft.pretrain_sft import run
from megasft.schema import SFTBatch


class TokenLog:
    """Writes the tokens of each share to a file, at once, since the rank may die; see ``Probe``."""

    def __init__(self, folder: Path, *, dies_in: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"rank{os.environ['RANK']}.jsonl").open("a")
        self.dies_in = dies_in

    def share(self, batch: SFTBatch) -> SFTBatch:
        """Note a share; die at the first one of the step that is the last."""
        from megatron.core import mpu
        from megatron.training import get_args

        step = get_args().curr_iteration + 1
        if step == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        noted = {
            "step": step,
            "dp_rank": mpu.get_data_parallel_rank(),
            "cp_rank": mpu.get_context_parallel_rank(),
            "tokens": batch.tokens.reshape(get_args().micro_batch_size, -1).tolist(),
        }
        print(json.dumps(noted), file=self.file, flush=True)
        return batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        """Leave the loss as it is."""
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        """Leave the gradients as they are."""


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry["flags"], probe=TokenLog(Path(entry["record"]), dies_in=entry["dies_in"]))
        forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
