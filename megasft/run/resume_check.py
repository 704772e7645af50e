"""Shows, before a run is resumed, that it will repeat and skip nothing, and what it trains next.

Nothing is trained and no process group is made: the old layout is replayed up to the checkpoint and
the new one from there on (``replay.py``), over the rows that the code of training plans, and the
rows of the epoch are counted. What Megatron itself asserts when it loads is asked of Megatron.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from megasft.errors import FlagError
from megasft.run import start
from megasft.training import datasets, resume
from megasft.training.replay import batch_size_at, batch_sizes, check_batches, position_after
from megasft.training.resume_proof import Proof, epoch_at, prove_rows
from megasft.training.saved_flags import FlagReader, complete, merge


class Resume(NamedTuple):
    """A checkpoint, and the run that is to continue it.

    Attributes:
        folder: Of the checkpoint.
        state: What Megatron saved beside tensors.
        old: Flags of the checkpoint.
        new: Flags of the run to come, validated.
        data: Its stores and plans.
        changed: Flags that differ, as they were given: the checkpoint's value and the new one.
    """

    folder: Path
    state: dict[str, Any]
    old: Any
    new: Any
    data: datasets.RunData
    changed: dict[str, tuple[Any, Any]]

    @property
    def consumed(self) -> int:
        """Return the position: rows trained before the checkpoint."""
        return int(self.old.consumed_train_samples)

    @property
    def iteration(self) -> int:
        """Return the steps trained before the checkpoint."""
        return int(self.state["iteration"])


def open_resume(
    checkpoint: Path,
    flags: Sequence[str],
    *,
    without: Sequence[str] = (),
    world_size: int | None = None,
) -> Resume:
    """Read a checkpoint and plan the run that is to continue it, as ``pretrain_sft.run`` would.

    Args:
        checkpoint: A ``--save`` folder, or one checkpoint in it.
        flags: Flags of the run to come where they differ from those of the checkpoint.
        without: Flags of the checkpoint that are not given any more.
        world_size: Ranks of the run to come.

    Raises:
        FlagError: There is no checkpoint, it was trained on other rows, or Megatron refuses.
        MegasftError: Stores or mixture of the run to come do not fit.
    """
    reader = FlagReader()
    given = reader.given(flags)
    folder = _folder(checkpoint)
    state = resume.read_state(folder)
    if resume.identity_in(state) is None:
        raise FlagError(f"{folder} was not saved by a run of megasft, so its rows are not known")
    names = [reader.name_of(flag) for flag in without]
    saved = merge(state["args"], {}, reader, without=(), world_size=None)
    args = merge(state["args"], given, reader, without=names, world_size=world_size)
    changed = {
        reader.flag_of(name): (getattr(saved, name), getattr(args, name))
        for name in reader.defaults
        if getattr(saved, name) != getattr(args, name)
    }
    if args.finetune or args.override_ckpt_iteration is not None:
        raise FlagError(
            "--finetune and --override-ckpt-iteration set the position by hand, so nothing is "
            "resumed; drop it"
        )
    args.load, args.ckpt_step = str(folder.parent), int(folder.name.removeprefix("iter_"))
    begun = start.settle(args)
    with _refusals("Megatron refuses these flags"), batch_sizes(args):
        pass
    old = complete(state["args"], reader)
    resumed = Resume(folder, state, old, args, begun.data, changed)
    _ask_megatron(resumed)
    return resumed


def _folder(checkpoint: Path) -> Path:
    """Return the folder of the checkpoint meant."""
    if checkpoint.name.startswith("iter_"):
        folder: Path | None = checkpoint
    else:
        folder = resume.find(SimpleNamespace(load=checkpoint, ckpt_step=None))
    if folder is None or not folder.is_dir():
        raise FlagError(
            f"{folder or checkpoint} holds no checkpoint; give the --save folder of a run, or an "
            "iter_... folder in it"
        )
    if folder.name == resume.RELEASE:
        raise FlagError(f"{checkpoint} is a converted model; there is no run to resume")
    return folder.absolute()


@contextmanager
def _refusals(what: str, remedy: str = "") -> Iterator[None]:
    """Turn Megatron's assertions into errors of the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (AssertionError, ValueError, RuntimeError) as error:
        raise FlagError(f"{what}: {error}{remedy}") from error


def _ask_megatron(resumed: Resume) -> None:
    """Let Megatron assert what it asserts when it loads the checkpoint.

    Mirrors ``load_checkpoint`` of megatron.training.checkpointing, 0.19.2.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training import checkpointing, global_vars

    state, new = resumed.state, resumed.new
    global_vars.set_args(new)
    checkpointing.set_checkpoint_version(state.get("checkpoint_version", 0))
    try:
        with _refusals("Megatron will refuse to load the checkpoint"):
            checkpointing.check_checkpoint_args(state["args"])
    finally:
        global_vars.set_args(None)
    learning_rate(new, state)
    sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    free = DistributedOptimizer.checkpoint_fully_reshardable_formats
    is_loaded = new.use_distributed_optimizer and not new.no_load_optim
    if is_loaded and is_resharded(resumed) and sharding not in (None, *free):
        raise FlagError(
            f"the checkpoint's optimizer is saved as {sharding}, which loads at its own TP and PP "
            "only; keep them, or pass --no-load-optim to start the moments anew"
        )


def is_resharded(resumed: Resume) -> bool:
    """Say whether tensor or pipeline parallelism changes."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return any(getattr(resumed.old, name) != getattr(resumed.new, name) for name in names)


def learning_rate(args: Any, state: dict[str, Any]) -> float:
    """Return the learning rate of the step after a checkpoint, from Megatron's own scheduler.

    Raises:
        FlagError: The schedule differs from the checkpoint's, which Megatron asserts.
    """
    from megatron.training import global_vars
    from megatron.training.training import get_optimizer_param_scheduler

    groups: list[dict[str, Any]] = [{}]
    args = copy(args)
    if args.train_samples is not None:
        args.train_iters = None  # saved flags hold both; Megatron sets it again
    global_vars.set_args(args)
    remedy = (
        "; --use-checkpoint-opt-param-scheduler keeps the schedule of the checkpoint, "
        "--override-opt-param-scheduler takes that of the flags"
    )
    try:
        with (
            _refusals("Megatron will refuse the learning-rate schedule", remedy),
            redirect_stdout(io.StringIO()),
            batch_sizes(args),
        ):
            scheduler = get_optimizer_param_scheduler(SimpleNamespace(param_groups=groups))
            if not (args.no_load_optim or state["args"].no_save_optim):
                scheduler.load_state_dict(state["opt_param_scheduler"])
    finally:
        global_vars.set_args(None)
    return float(groups[0]["lr"])


def num_steps_to_come(resumed: Resume) -> int:
    """Return the steps Megatron will train until the run ends."""
    from megatron.training.training import update_train_iters

    args = copy(resumed.new)
    with batch_sizes(args), redirect_stdout(io.StringIO()):
        update_train_iters(args)
    return max(0, int(args.train_iters) - resumed.iteration)


def prove(resumed: Resume) -> Proof:
    """Replay the epochs around a checkpoint and count how often each row is trained.

    Raises:
        FlagError: The ranks of the run to come do not divide its global batches.
    """
    plan, new = resumed.data.train.plan, resumed.new
    end = epoch_at(plan, resumed.consumed).end
    with _refusals("Megatron will refuse a global batch"):
        check_batches(new, start=resumed.consumed, end=end)
    return prove_rows(resumed.old, new, plan)


def cautions(resumed: Resume) -> list[str]:
    """Return what is lost or means something else when the run resumes, in sentences."""
    old, new = resumed.old, resumed.new
    found = []
    steps = num_steps_to_come(resumed)
    end = position_after(new, start=resumed.consumed, num_steps=steps)
    if not steps:
        found.append(
            f"the run ends before its next step: {resumed.iteration:,} steps are done; raise its "
            "length (--train-iters, --train-samples or --megasft-epochs)"
        )
    elif new.train_samples is not None and abs(end - new.train_samples) >= batch_rows(new, end):
        found.append(
            f"Megatron divides --train-samples {new.train_samples:,} by the new batch size to know "
            f"its last step, so the run ends at row {end:,}; set --train-samples accordingly"
        )
    if new.no_load_optim or old.no_save_optim:
        found.append(
            "the optimizer is not loaded: its moments and the learning-rate schedule start anew"
        )
    elif new.use_distributed_optimizer and not old.use_distributed_optimizer:
        found.append(
            "--use-distributed-optimizer is new, and Megatron keeps moments in another form with "
            "it; if loading fails, --no-load-optim starts them anew"
        )
    if max(new.attention_dropout, new.hidden_dropout) > 0 and is_resharded(resumed):
        found.append("with another TP or PP Megatron draws dropout anew: losses are not the same")
    if new.num_experts and new.micro_batch_size != old.micro_batch_size:
        found.append(
            "--micro-batch-size is not what it was, and a router's balancing loss is one of a "
            "micro-batch"
        )
    if getattr(old, "skipped_train_samples", 0):
        found.append(
            f"{old.skipped_train_samples:,} of the rows before were skipped by --iterations-to-skip"
        )
    return found


def batch_rows(args: Any, position: int) -> int:
    """Return the size of the global batch at a position."""
    with batch_sizes(args):
        return batch_size_at(position)
