"""Checkpoints of a run: saved when it is told to end, and what to do when saving failed.

A scheduler announces the end of a job by a signal. With ``--save`` Megatron's own handler is on by
default: the signal of ``--exit-signal`` (SIGTERM) on any rank makes all of them save after the
step and exit with 0. Slurm's usual warning, SIGUSR1, and a closed terminal's SIGHUP do the
same.

So an exit code of 0 does not say that a run is complete; a file ``complete.json`` beside the
checkpoints does, which is gone while a run goes on.
"""

import logging
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import orjson

from megasft import files
from megasft.compat import has
from megasft.errors import FlagError, SaveError
from megasft.files import write_whole
from megasft.megatron import cpu
from megasft.megatron.checkpoint import read_state
from megasft.training import resume
from megasft.training.best import BestTracker, has_lost_patience
from megasft.training.report_arguments import log_folder
from megasft.training.retention import Retention, iteration_of, whole_checkpoints

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
    # Megatron 0.19 saves synchronously without it, and warns.
    args.use_persistent_ckpt_worker = True
    if args.async_strategy == "nvrx" and not has("nvidia_resiliency_ext"):
        args.async_strategy = "mcore"
        logger.info("--async-save uses --async-strategy mcore: nvidia-resiliency-ext is missing")


@contextmanager
def only_writer(args: Any) -> Iterator[None]:
    """Keep other runs from writing to the folders of this one; rank 0 does it for all.

    Raises:
        FlagError: Another run writes to ``--save``, or to the folder of the log.
    """
    saves = [Path(args.save)] if args.save and not args.skip_train else []
    log = log_folder(args)
    folders = dict.fromkeys(folder.resolve() for folder in (*saves, log) if folder is not None)
    with ExitStack() as stack:
        for folder in folders if args.rank == 0 else ():
            stack.enter_context(files.only_writer(folder))
        yield


@contextmanager
def ends_by_signal(args: Any) -> Iterator[None]:
    """Make SIGUSR1 and SIGHUP end a run as ``--exit-signal`` does, while Megatron's handler is on.

    torchrun passes a closed terminal's SIGHUP on to the ranks, which would die of it. Under
    ``nohup`` it is ignored, and stays so.
    """
    if not args.exit_signal_handler:
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: signal.raise_signal(args.exit_signal))
        for number in (signal.SIGUSR1, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def is_over(args: Any) -> bool:
    """Say whether a run has ended already, so that nothing of it is left to do.

    It has when ``--load`` is ``--save`` and the checkpoint there is of its last step and marked as
    complete, or when its early stop has ended it. A run that was killed between its last save and
    the mark is not over: its last evaluation may be missing.

    Args:
        args: Megatron's flags and ours, the length of the run included.
    """
    checkpoint = _own_checkpoint(args)
    if checkpoint is None:
        return False
    iteration = iteration_of(checkpoint)
    if args.megasft_best is not None and has_lost_patience(args, iteration=iteration):
        return True
    return _is_last(args, checkpoint) and _completed(checkpoint.parent) == iteration


def end_again(args: Any) -> None:
    """Say that a run is over, and mark it as complete where the process that ended it did not."""
    checkpoint = _own_checkpoint(args)
    assert checkpoint is not None, "the run is over"
    if args.rank == 0:
        mark_complete(checkpoint.parent)
    logger.info(
        "the run is complete: %s is its last checkpoint, and nothing is trained or written again; "
        "to go on, raise --train-iters, --train-samples or --megasft-epochs%s",
        checkpoint,
        " (or --megasft-early-stop)" if args.megasft_early_stop is not None else "",
    )


def _own_checkpoint(args: Any) -> Path | None:
    """Return the checkpoint of this very run that it goes on from, if there is one."""
    if not (args.load and args.save) or args.finetune or args.skip_train or args.ckpt_step:
        return None
    if Path(args.load).resolve() != Path(args.save).resolve():
        return None
    checkpoint = resume.find(args)
    return None if checkpoint is None or checkpoint.name == resume.RELEASE else checkpoint


def _is_last(args: Any, checkpoint: Path) -> bool:
    """Say whether no step is left to train after a checkpoint."""
    steps = args.train_iters
    if args.train_samples is not None and args.step_batch_size_schedule:
        consumed = read_state(checkpoint)["args"].consumed_train_samples
        return bool(consumed >= args.train_samples)
    if args.train_samples is not None and args.global_batch_size:
        steps = args.train_samples // args.global_batch_size  # as Megatron rounds it
    return steps is not None and iteration_of(checkpoint) >= steps


def check_steps_left(args: Any) -> None:
    """Refuse a run that would end at once, though it has not trained the rows of its length.

    Megatron counts steps, so a run that goes on with larger global batches may have passed the
    number of its last step while most of an epoch is still to be trained.

    Raises:
        FlagError: With the rows trained and wanted, and the remedy.
    """
    checkpoint = _own_checkpoint(args)
    if checkpoint is None or args.step_batch_size_schedule or not _is_last(args, checkpoint):
        return
    saved = read_state(checkpoint)["args"]
    steps = args.train_iters or args.train_samples // args.global_batch_size
    wanted = steps * (args.global_batch_size or 0)
    if saved.consumed_train_samples >= wanted:
        return
    raise FlagError(
        f"{checkpoint} has trained {saved.consumed_train_samples:,} rows in "
        f"{iteration_of(checkpoint):,} steps of {saved.global_batch_size:,}, and this run is "
        f"{steps:,} steps of {args.global_batch_size:,} long, which are {wanted:,} rows; Megatron "
        "counts steps, so it would end at once. Give the step it shall end at, --train-iters N"
    )


def _completed(folder: Path) -> int | None:
    """Return the step of ``complete.json``, if there is such a file."""
    try:
        return int(orjson.loads((folder / COMPLETE).read_bytes())["iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_complete(folder: Path) -> None:
    """Write ``complete.json``, unless it says so already."""
    whole = whole_checkpoints(folder)
    if whole and _completed(folder) != whole[-1]:
        write_whole(folder / COMPLETE, orjson.dumps({"iteration": whole[-1]}))


class Keeper:
    """Sees to a run's checkpoints after every step: what is the best, and what may go.

    A run with ``--skip-train`` only evaluates, and its checkpoints are left as they are.

    Args:
        args: Megatron's flags.
        rank: Of all ranks; the first one writes and deletes.
    """

    def __init__(self, args: Any, *, rank: int) -> None:
        self.args = args
        saves, is_first = args.save and not args.skip_train, rank == 0
        self.folder = Path(args.save) if saves and is_first else None
        self._has_stepped, self._evaluated_step = False, -1
        self.best = None
        if saves and args.megasft_best is not None:
            self.best = BestTracker(args, writes=is_first)
        self.retention = None
        if self.folder is not None and args.megasft_keep_last is not None:
            # A run that does not go on from what is in its folder is another one than made it.
            foreign = () if _own_checkpoint(args) else whole_checkpoints(self.folder)
            self.retention = Retention(
                self.folder, keep_last=args.megasft_keep_last, foreign=foreign
            )

    def spare_last_save(self, settings: Any) -> None:
        """Keep Megatron from writing its last checkpoint a second time at the end of a run.

        It does so unless the interval it began with divides the last step, and a kill meanwhile
        would leave half of the only checkpoint that the tracker names.

        Args:
            settings: Megatron's checkpointing settings, ``config.checkpoint``.
        """
        checkpoint = _own_checkpoint(self.args)
        if checkpoint is not None and _is_last(self.args, checkpoint):
            settings.save_interval = 1  # no step is left, so there is nothing to save
        elif self.best is not None:
            self.best.intervals.append(settings)

    def end_step(self) -> None:
        """Do what is to be done once a step, before Megatron evaluates or saves after it."""
        self._has_stepped = True
        if self.best is not None:
            self.best.begin_step()
        self._delete()

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Follow an evaluation: the loss of each validation store, and of all together."""
        self._evaluated_step = iteration
        if self.best is not None:
            self.best.evaluated(iteration, losses)

    def __enter__(self) -> Self:
        if self.folder is not None:
            (self.folder / COMPLETE).unlink(missing_ok=True)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Mark a complete run, delete what its last checkpoint has made superfluous."""
        if self.folder is not None and self._is_complete(self.folder, error):
            mark_complete(self.folder)
        if self._has_stepped or error is None:  # else it is not known what was the best until here
            self._delete()
        if self.retention is not None:
            self.retention.wait()

    def _is_complete(self, folder: Path, error: BaseException | None) -> bool:
        """Say whether a run is complete: it trained, saved and evaluated all that it should."""
        if error is not None:
            has_ended = self.best is not None and self.best.has_ended_run
            return has_ended and isinstance(error, SystemExit)
        # --exit-duration-in-mins may end it in its last evaluation.
        return not self.args.eval_iters or self._evaluated_step in whole_checkpoints(folder)[-1:]

    def _delete(self) -> None:
        if self.retention is None or not self.retention.is_due:
            return
        kept: set[int] = set()
        if self.best is not None:
            # While an asynchronous save of a new best is under way, the one before is the best.
            whole = whole_checkpoints(self.retention.folder)
            kept = self.best.kept | (self.best.kept_until(whole[-1]) if whole else set())
        self.retention.look(keep=kept)
