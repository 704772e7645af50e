"""Runs the real training entry point several times in one process group; started by torchrun.

Starting processes is what costs here, so one start serves many layouts.

Usage: torchrun --nproc-per-node N -m tests.megatron.worker RUNS.json, a list of lists of flags.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

from megasft.megatron import cpu
from megasft.megatron.worker import forget
from megasft.pretrain_sft import configure_logging, run


def main() -> None:
    configure_logging(rank=0)
    cpu.prepare()  # before anything of Megatron is imported
    cpu.remember_docstrings()
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        # --exit-interval ends a run through sys.exit, as a scheduler's time limit would.
        with suppress(SystemExit):
            run(flags)
        forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
