"""Checkpoints of a run: saved when it is told to end, and what to do when saving failed.

A scheduler announces the end of a job by a signal. With ``--save`` Megatron's own handler is on by
default: the signal of ``--exit-signal`` (SIGTERM) on any rank makes all of them save behind the
step and exit with 0. Slurm's usual warning, SIGUSR1, does the same.

So an exit code of 0 does not say that a run is complete; a file ``complete.json`` beside the
checkpoints does, which is gone while a run goes on.
"""

import logging
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import orjson

from megasft import cpu
from megasft.compat import has
from megasft.errors import FlagError, SaveError
from megasft.files import write_whole
from megasft.training.best import BestTracker
from megasft.training.retention import Retention, whole_checkpoints

logger = logging.getLogger(__name__)

GIB: Final = 2**30
COMPLETE: Final = "complete.json"


def check(args: Any) -> None:
    """Refuse to save in a way that would not end.

    Raises:
        FlagError: Checkpoints cannot be written as asked for.
    """
    if args.save and args.async_save and cpu.is_needed():
        raise FlagError(
            "--async-save: Megatron 0.19's writer process asks for a CUDA device and waits for "
            "ever without one; drop it here"
        )


def apply(args: Any) -> None:
    """Set what saving needs, before Megatron validates its flags."""
    if not args.save:
        return
    args.exit_signal_handler = True
    if not args.async_save:
        return
    if args.async_strategy == "nvrx" and not has("nvidia_resiliency_ext"):
        args.async_strategy = "mcore"
        logger.info("--async-save uses --async-strategy mcore: nvidia-resiliency-ext is missing")


@contextmanager
def ends_by_signal(args: Any) -> Iterator[None]:
    """Make SIGUSR1 end a run as ``--exit-signal`` does, while Megatron's handler is on."""
    if not args.exit_signal_handler:
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(args.exit_signal))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def explains_failed_saves(args: Any) -> Iterator[None]:
    """Say of an error while saving what is left, and how to go on.

    Raises:
        SaveError: From the error; others pass.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not _is_of_saving(error):
            raise
        raise SaveError(_explanation(args, error)) from error


def _is_of_saving(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    names = {"save_checkpoint", "maybe_finalize_async_save"}
    return any(frame.name in names and "megatron" in frame.filename for frame in frames)


def _reason(error: BaseException) -> str:
    """Return an error in a line; torch's for all ranks is a page of tracebacks."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f"with {type(error).__name__}: {error}".splitlines()[0]
    rank, (first, _) = next(iter(failures.items()))
    others = f", and on {len(failures) - 1} more" if len(failures) > 1 else ""
    return f"on rank {rank}{others}: {first}"


def _explanation(args: Any, error: BaseException) -> str:
    folder = Path(args.save)
    whole = whole_checkpoints(folder)
    left = (
        f"step {whole[-1]} is whole, and the same command with --load {folder} goes on from there"
        if whole
        else "no whole checkpoint is there yet"
    )
    try:
        usage = shutil.disk_usage(folder)
        free = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free there"
    except OSError as unknown:
        free = f"the free space is not known ({unknown})"
    return (
        f"saving step {args.curr_iteration + 1} to {folder} failed {_reason(error)} "
        f"({free}); {left}. Free space, or keep fewer checkpoints with --megasft-keep-last N"
    )


class Keeper:
    """Sees to a run's checkpoints behind every step: what is the best, and what may go.

    Args:
        args: Megatron's flags.
        rank: Of all ranks; the first one writes and deletes.
    """

    def __init__(self, args: Any, *, rank: int) -> None:
        self.folder = Path(args.save) if args.save and rank == 0 else None
        self.best = None if args.megasft_best is None else BestTracker(args, writes=rank == 0)
        self.retention = None
        if rank == 0 and args.megasft_keep_last is not None:
            self.retention = Retention(Path(args.save), keep_last=args.megasft_keep_last)

    def end_step(self) -> None:
        """Do what is to be done once a step, before Megatron evaluates or saves behind it."""
        if self.best is not None:
            self.best.begin_step()
        self._delete()

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Hear of an evaluation: the loss of each validation store, and of all together."""
        if self.best is not None:
            self.best.evaluated(iteration, losses)

    def __enter__(self) -> Self:
        if self.folder is not None:
            (self.folder / COMPLETE).unlink(missing_ok=True)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Mark a complete run, delete what its last checkpoint has made superfluous."""
        is_over = self.best is not None and self.best.has_ended_run
        if self.folder is not None and (error is None or is_over):
            self._mark_complete(self.folder)
        self._delete()
        if self.retention is not None:
            self.retention.wait()

    @staticmethod
    def _mark_complete(folder: Path) -> None:
        whole = whole_checkpoints(folder)
        if whole:
            write_whole(folder / COMPLETE, orjson.dumps({"iteration": whole[-1]}))

    def _delete(self) -> None:
        if self.retention is not None:
            self.retention.look(keep=set() if self.best is None else self.best.kept)
