"""What a rank may do to the group it is in; started by tests of ``megasft.ranks``.

Usage: -m tests.unit.ranks.rank_worker ACT [FOLDER]
"""

import json
import multiprocessing
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])
HANGING_SECONDS = 600


def write_name(folder: Path) -> None:
    """Say which process this is, and what it imported as its main program."""
    main = sys.modules["__main__"]
    spec = main.__spec__.name if main.__spec__ else None
    (folder / f"spawned{RANK}.json").write_text(json.dumps({"name": main.__name__, "spec": spec}))


def tell(folder: Path) -> None:
    """Write what must be a rank's own, and what it must find as in a new process."""
    dist.init_process_group("gloo")
    total = torch.tensor(RANK + 1)
    dist.all_reduce(total)
    writer = multiprocessing.get_context("spawn").Process(target=write_name, args=(folder,))
    writer.start()
    writer.join()
    found = {
        "threads_before": THREADS,
        "sum": int(total),
        "random": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        "argv": sys.argv[1:],
        "file": Path(sys.argv[0]).name,
        "environment": {k: os.environ.get(k) for k in ("WORLD_SIZE", "LOCAL_RANK", "ONLY_HERE")},
        "writer": writer.exitcode,
    }
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def hang(folder: Path) -> None:
    """Start a process of this rank's own, say that all is up, and wait."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(HANGING_SECONDS,))
    child.start()
    (folder / f"pids{RANK}.tmp").write_text(json.dumps([os.getpid(), child.pid]))
    (folder / f"pids{RANK}.tmp").rename(folder / f"pids{RANK}.json")
    time.sleep(HANGING_SECONDS)


def fail(folder: Path) -> None:
    """Hang on rank 0, once it has said so; fail on the others."""
    if RANK == 0:
        hang(folder)
    while not (folder / "pids0.json").exists():
        time.sleep(0.01)
    raise ValueError("this rank cannot go on")


if __name__ == "__main__":
    THREADS = threading.active_count()
    {"tell": tell, "hang": hang, "fail": fail}[sys.argv[1]](Path(sys.argv[2]))
