"""Runs the real training entry point several times, with something happening to a rank at a step.

Usage: torchrun --nproc-per-node N -m tests.megatron.saving_worker RUNS.json, a list of
{"flags": [...], "ranks": [R, ...], "step": S, "event": "usr1" | "term" | "disk-full" | "unmark"
| null}, where the last takes ``complete.json`` away before the run.
What became of each run is written beside it: I-RANK.json with the exit code or the error, and how
many processes the rank has started; that of rank 0 names the files of ``--save`` that it changed.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from megasft.errors import MegasftError
from megasft.loss.loss_func import LossOutput
from megasft.megatron.worker import forget
from megasft.pretrain_sft import configure_logging, run
from megasft.schema import SFTBatch
from megasft.training.saving import COMPLETE

SIGNALS = {"usr1": signal.SIGUSR1, "term": signal.SIGTERM}
SMALL_FILE = 600_000
"""Bytes: more than the log of these runs, less than a part of a checkpoint."""


class Event:
    """A probe that does something to its own process before the optimizer's step."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.event, self.ranks, self.at = entry["event"], entry["ranks"], entry["step"]
        self.step = 0

    def share(self, batch: SFTBatch) -> SFTBatch:
        return batch

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        return output

    def gradients(self, model: list[Any], units: int) -> None:
        self.step += 1
        if torch.distributed.get_rank() not in self.ranks or self.step != self.at:
            return
        if self.event in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.event])
        if self.event == "disk-full":
            # Writers inherit it; Python ignores SIGXFSZ, so writes fail as on a full disk.
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, hard))


def saved_to(flags: list[str]) -> Path | None:
    return Path(flags[flags.index("--save") + 1]) if "--save" in flags else None


def files_in(folder: Path | None) -> dict[str, tuple[int, int]]:
    """Inode and time of each file: what is written again, even with the same bytes, differs."""
    files = folder.rglob("*") if folder else ()
    stats = {str(path.relative_to(folder)): path.stat() for path in files if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def main() -> None:
    configure_logging(rank=int(os.environ["RANK"]))
    listing = Path(sys.argv[1])
    for i, entry in enumerate(json.loads(listing.read_text())):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        outcome: dict[str, Any] = {"exit": None, "error": None}
        folder = saved_to(entry["flags"])
        if entry["event"] == "unmark" and folder is not None and torch.distributed.get_rank() == 0:
            (folder / COMPLETE).unlink()
        before = files_in(folder)
        try:
            run(entry["flags"], probe=Event(entry))
        except SystemExit as ended:
            outcome["exit"] = ended.code
        except MegasftError as error:
            outcome["error"] = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        outcome["processes"] = len(psutil.Process().children())
        rank = torch.distributed.get_rank()
        if rank == 0:
            after = files_in(folder)
            changed = sorted(name for name in before | after if before.get(name) != after.get(name))
            outcome["changed"], outcome["is_complete"] = changed, COMPLETE in after
        listing.with_name(f"{i}-{rank}.json").write_text(json.dumps(outcome))
        forget()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
