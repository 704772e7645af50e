"""A rank that starts at once and ends as it is told: ``small_rank MODE FOLDER``."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

RANK = int(os.environ["RANK"])
MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
PATIENCE_SECONDS = 60.0


def wait_for(name: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (FOLDER / name).exists():
        if time.monotonic() > deadline:
            sys.exit(f"{name} did not come")
        time.sleep(0.01)


def follow() -> None:
    """Fail as a rank whose neighbour is gone, and be the first that torchrun sees end."""
    if RANK == 0:
        wait_for("wrong")
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    try:
        raise ValueError("rank one is wrong")
    except ValueError:
        traceback.print_exc()
    print("[W1121 12:00:00.1 ProcessGroup.cpp:1] destroy_process_group() was not", file=sys.stderr)
    (FOLDER / "wrong").touch()
    time.sleep(PATIENCE_SECONDS)


def kill() -> None:
    if RANK == 1:
        print("about to take memory", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE_SECONDS)


def refuse() -> None:
    """End as megasft does on a user's fault: all ranks, and only rank 0 says why."""
    (FOLDER / f"refused.{RANK}.{time.monotonic_ns()}").touch()
    if RANK == 0:
        print("[megasft] error: there is no store", file=sys.stderr, flush=True)
        (FOLDER / "wrong").touch()
    wait_for("wrong")
    sys.exit(1)


def again() -> None:
    start = sum(1 for path in FOLDER.iterdir() if path.name.startswith(f"start.{RANK}."))
    facts = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    (FOLDER / f"start.{RANK}.{start}").write_text(" ".join(os.environ[name] for name in facts))
    if start == 0:
        wait_for(f"start.{1 - RANK}.0")
        raise ValueError("only the first time")


def save() -> None:
    """Take longer to end on SIGTERM than torchrun waits here, as a rank that saves does."""

    def saves(number: int, frame: object) -> None:
        time.sleep(2 * float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.25")))
        (FOLDER / f"saved.{RANK}").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, saves)
    (FOLDER / f"ready.{RANK}").touch()
    time.sleep(PATIENCE_SECONDS)


if __name__ == "__main__":
    {"follow": follow, "kill": kill, "refuse": refuse, "again": again, "save": save}[MODE]()
