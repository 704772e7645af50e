"""Trains with a loss that counts one unit too many on one rank, from one step on.

Usage: torchrun --nproc-per-node N -m tests.invariance.miscount_worker STEP RESULT.json FLAGS...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megasft.errors import AuditError
from megasft.loss.loss_func import LossOutput
from megasft.pretrain_sft import run
from megasft.schema import SFTBatch


class Miscount:
    """Counts right until a step, and one too many on the last rank in it; see ``Probe``."""

    def __init__(self, step: int) -> None:
        self.step, self.trained = step, 0

    def share(self, batch: SFTBatch) -> SFTBatch:
        return batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if self.trained + 1 == self.step and is_last:
            return output._replace(units=output.units + 1)
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        self.trained += 1


def main() -> None:
    step, result, *flags = sys.argv[1:]
    probe = Miscount(int(step))
    message = ""
    try:
        run(flags, probe=probe)
    except AuditError as error:
        message = str(error)
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps({"trained": probe.trained, "message": message}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
