"""What Megatron keeps beside a checkpoint's tensors, what it refuses, and the step that is next.

Megatron's own functions are asked, before a model is built. They read the flags and the batch sizes
from globals of Megatron, which are set for the call alone.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from megasft.errors import FlagError

RATES: Final = {"max_lr": ("decoupled_lr", "lr"), "min_lr": ("decoupled_min_lr", "min_lr")}
"""What a group of parameters has for its learning rate, and the flags it is taken from."""


class NextStep(NamedTuple):
    """The step after a checkpoint.

    Attributes:
        num_rows: Of its global batch.
        learning_rate: It is made with.
        steps_to_come: Steps until the run ends, this one included.
    """

    num_rows: int
    learning_rate: float
    steps_to_come: int


def read_state(folder: Path) -> dict[str, Any]:
    """Return what Megatron saved beside the tensors: flags, iteration, learning-rate schedule.

    Args:
        folder: Of one checkpoint, ``iter_0000100``.
    """
    from megatron.core import dist_checkpointing

    state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    return state


def loads_optimizer(args: Any, state: dict[str, Any]) -> bool:
    """Say whether moments and schedule of a checkpoint are loaded."""
    return not (args.no_load_optim or state["args"].no_save_optim)


def next_step(args: Any, state: dict[str, Any]) -> NextStep:
    """Ask Megatron what it asserts when it loads a checkpoint, and return the step after it.

    Args:
        args: Megatron's flags, validated.
        state: What ``read_state`` returned.

    Raises:
        FlagError: Megatron refuses the checkpoint, or the first global batch after it.
    """
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import checkpointing, training

    args, groups = copy(args), [dict[str, Any]()]
    with _globals(args):
        with _refusals(
            "Megatron will refuse to load the checkpoint", "; give the flags of its model"
        ):
            checkpointing.set_checkpoint_version(state.get("checkpoint_version", 0))
            checkpointing.check_checkpoint_args(state["args"])
        _check_sharding(args, state)
        with _refusals(
            "Megatron will refuse the learning-rate schedule",
            "; --use-checkpoint-opt-param-scheduler keeps the schedule of the checkpoint, "
            "--override-opt-param-scheduler takes that of the flags",
        ):
            scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=groups))
            if loads_optimizer(args, state):
                scheduler.load_state_dict(state["opt_param_scheduler"])
        with _refusals(
            "Megatron will refuse the next global batch",
            "; start ranks, and choose a --micro-batch-size, that divide it",
        ):
            calculator.update_num_microbatches(
                int(state["args"].consumed_train_samples), consistency_check=True
            )
        num_rows = int(calculator.get_current_running_global_batch_size())
        training.update_train_iters(args)
    steps = max(0, int(args.train_iters) - int(state["iteration"]))
    return NextStep(num_rows, float(groups[0]["lr"]), steps)


@contextmanager
def _globals(args: Any) -> Iterator[None]:
    """Let Megatron's functions see these flags and their batch sizes, and print nothing."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import global_vars

    logs = logging.getLogger("megatron")
    level = logs.level
    logs.setLevel(logging.ERROR)
    global_vars.set_args(args)
    # As set_global_variables of megatron.training.global_vars, 0.19.2, does.
    calculator.init_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        calculator.unset_num_microbatches_calculator()
        global_vars.set_args(None)
        logs.setLevel(level)


@contextmanager
def _refusals(what: str, remedy: str) -> Iterator[None]:
    """Turn Megatron's assertions into errors of the user."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        raise FlagError(f"{what}: {str(error).rstrip('.')}{remedy}") from error


def _check_sharding(args: Any, state: dict[str, Any]) -> None:
    """Catch moments that load at the TP and PP they were saved at alone.

    Mirrors ``load_checkpoint`` of megatron.training.checkpointing, 0.19.2.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not (args.use_distributed_optimizer and loads_optimizer(args, state)):
        return
    sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    free = (None, *DistributedOptimizer.checkpoint_fully_reshardable_formats)
    if is_resharded(args, state) and sharding not in free:
        raise FlagError(
            f"the checkpoint's optimizer is saved as {sharding}, which loads at its own TP and PP "
            "only; keep them, or pass --no-load-optim to start the moments again"
        )


def is_resharded(args: Any, state: dict[str, Any]) -> bool:
    """Say whether tensor or pipeline parallelism is another than the checkpoint's."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return any(getattr(args, name) != getattr(state["args"], name) for name in names)


@contextmanager
def loads_other_rates(args: Any, state: dict[str, Any] | None) -> Iterator[None]:
    """Let Megatron load an optimizer whose groups of parameters had other learning rates.

    Megatron 0.19 finds the groups of a checkpoint by their largest and smallest rate, so with
    another ``--lr`` it ends with "Could not find parameter group", and had it found them, it would
    go on with their old rates, whatever ``--override-opt-param-scheduler`` says. So the groups have
    the checkpoint's rates until they are loaded, and those of the flags before the schedule sets
    the rate of the next step.

    Args:
        args: Megatron's flags, validated.
        state: What ``read_state`` returned of the checkpoint; None if there is none.
    """
    from megatron.training import training

    if state is None or not loads_optimizer(args, state):
        yield
        return
    build: Callable[[Any], Any] = training.get_optimizer_param_scheduler
    before = {
        rate: {getattr(args, flag): getattr(state["args"], flag) for flag in flags}
        for rate, flags in RATES.items()
    }

    def build_between(optimizer: Any) -> Any:
        scheduler = build(optimizer)
        load = scheduler.load_state_dict
        ours = [{rate: group[rate] for rate in RATES} for group in optimizer.param_groups]

        def load_with_ours(state: dict[str, Any]) -> None:
            for group, rates in zip(optimizer.param_groups, ours, strict=True):
                group.update(rates)
            load(state)

        for group in optimizer.param_groups:
            group.update({rate: before[rate].get(group[rate], group[rate]) for rate in RATES})
        scheduler.load_state_dict = load_with_ours
        return scheduler

    training.get_optimizer_param_scheduler = build_between
    try:
        yield
    finally:
        training.get_optimizer_param_scheduler = build
