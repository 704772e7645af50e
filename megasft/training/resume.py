"""Refuses to resume a run on rows other than those it was started with.

The position of a run is one integer, Megatron's consumed samples; it means something only on the
same row plan. So the plan's identity is saved with Megatron's flags in each checkpoint and compared
before anything is loaded. The layout (TP, PP, DP, CP) and the sizes of batches are free: rows do
not depend on them as long as ``--megasft-align-tokens`` covers the context parallelism, and dealing
rows to ranks (``row_order.py``) stays within a global batch. So the rows that come next follow from
the position alone, and ``megasft doctor`` shows them.

The flags of the run are saved as they were given too (``megasft_flags``), because Megatron saves
what its validation made of them, which it does not accept a second time.
"""

import logging
import re
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from megasft.compat import has
from megasft.errors import FlagError
from megasft.megatron.checkpoint import RATES, read_state
from megasft.training.retention import TRACKER, iteration_name, iteration_of

logger = logging.getLogger(__name__)

RELEASE: Final = "release"
"""What the tracker says of weights without a run: a converted model."""

SCHEDULE: Final = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
"""Flags that the learning-rate schedule is made of, but for the length of the run."""

FILLED_IN: Final = ("start_weight_decay", "end_weight_decay")
"""Those of them that Megatron takes from --weight-decay."""

OF_ONE_START: Final = frozenset({"--load", "--ckpt-step", "--finetune"})
"""Flags that say how a run was started, not what it is."""

EXCLUSIVE: Final = (
    frozenset({"--train-iters", "--train-samples", "--megasft-epochs"}),
    frozenset({"--global-batch-size", "--step-batch-size-schedule"}),
    frozenset({"--save-interval", "--megasft-save-epochs"}),
    frozenset({"--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"}),
)
"""Of these one is given; a new one replaces the one saved."""

KINDS: Final = {
    "plan version": r"plan version ",
    "store": r"store ",
    "number of samples": r"\d+ samples$",
    "row_tokens": r"row_tokens ",
    "align_tokens": r"align_tokens ",
    "seed": r"seed ",
    "mixture": r"mixture ",
    "cost window": r"cost window ",
    "packings": r"\d+ packings",
    "packer": r"\w+$",
}
"""What the parts of an identity are about, and how such a part starts; see ``plan_rows``."""


def check(args: Any, state: dict[str, Any] | None, plan_identity: str) -> list[str]:
    """Compare this run's row plan with the one of the checkpoint it will load, and remember it.

    Args:
        args: Megatron's flags; ``megasft_plan`` is set, so that checkpoints carry it.
        state: Of ``state_to_resume``.
        plan_identity: ``row_order.identity`` of the training store.

    Returns:
        What there is to warn of, in sentences.

    Raises:
        FlagError: The checkpoint was trained on other rows, or cannot be continued.
    """
    args.megasft_plan = plan_identity
    warnings = _check_optimizer(args)
    if state is None:
        return warnings
    _check_form_of_moments(args, state["args"])
    saved = str(state["args"].megasft_plan)
    if saved == plan_identity:
        return warnings
    raise FlagError(
        f"--load {args.load} was trained on other rows ({differences(saved, plan_identity)}), so "
        "its position means nothing here; use the same stores, --megasft-mixture, "
        "--megasft-packer, --megasft-packings, --megasft-cost-window, --seq-length, --seed and "
        "--megasft-align-tokens, or start again from its weights with --finetune"
    )


def differences(saved: str, ours: str) -> str:
    """Name the parts in which two identities differ.

    Example:
        >>> differences("balanced, seed 1, mixture mixed 1a", "balanced, seed 2")
        'checkpoint: seed 1, this run: seed 2; checkpoint: mixture mixed 1a, this run: no mixture'
    """
    theirs, these = _by_kind(saved), _by_kind(ours)
    return "; ".join(
        f"checkpoint: {theirs.get(kind, f'no {kind}')}, this run: {these.get(kind, f'no {kind}')}"
        for kind in dict.fromkeys([*theirs, *these])
        if theirs.get(kind) != these.get(kind)
    )


def _by_kind(identity: str) -> dict[str, str]:
    found = {}
    for part in identity.split(", "):
        kind = next((kind for kind, start in KINDS.items() if re.match(start, part)), part)
        found[kind] = part
    return found


def _check_optimizer(args: Any) -> list[str]:
    """Catch what Megatron 0.19 cannot load back: its distributed optimizer over torch's Adam."""
    if not args.use_distributed_optimizer or has("transformer_engine") or has("apex"):
        return []
    fact = (
        "without Transformer Engine or Apex, Megatron 0.19 cannot load a checkpoint of "
        "--use-distributed-optimizer (it asserts that torch's Adam has a step count already)"
    )
    if find(args) is not None and not (args.finetune or args.no_load_optim):
        raise FlagError(f"{fact}; drop the flag, or pass --no-load-optim to start it again")
    return [f"{fact}; a run saved to {args.save} will not resume with its moments"] * bool(
        args.save
    )


def _check_form_of_moments(args: Any, saved: Any) -> None:
    """Catch a checkpoint whose moments Megatron 0.19 cannot read without the flag it had."""
    if args.no_load_optim or args.use_distributed_optimizer or saved.no_save_optim:
        return
    if saved.use_distributed_optimizer:
        raise FlagError(
            f"--load {args.load} was saved with --use-distributed-optimizer, and without the flag "
            "Megatron 0.19 does not find its moments; add the flag, or pass --no-load-optim to "
            "start them again"
        )


def follow_schedule(args: Any, state: dict[str, Any] | None) -> str | None:
    """Set what the learning-rate schedule of a resumed run needs, and say what was set.

    Megatron asserts that the schedule is that of the checkpoint, unless one of two flags says which
    of them holds. A run that only gets longer goes by the schedule of its new length. With
    ``--use-checkpoint-opt-param-scheduler`` the rates are the checkpoint's too, since Megatron
    looks for groups of parameters with the rates of the flags. A run that changes more than its
    length is left to these flags.

    Args:
        args: Megatron's flags, not validated yet.
        state: Of ``state_to_resume``.
    """
    if state is None or args.no_load_optim or args.skip_train or args.override_opt_param_scheduler:
        return None
    saved = state["args"]
    if args.use_checkpoint_opt_param_scheduler:
        return _keep_rates(args, saved)
    before, now = (
        [getattr(of, name, None) for name in ("train_iters", "train_samples")]
        for of in (saved, args)
    )
    # Megatron fills train_iters in from train_samples before it saves.
    is_other_length = before[1:] != now[1:] if now[1] else before != now
    if not is_other_length or not all(_is_same(saved, args, name) for name in SCHEDULE):
        return None
    args.override_opt_param_scheduler = True
    return (
        f"the run was {_length(*before)} long and is {_length(*now)} now: its learning rate "
        "follows the schedule of the new length (--override-opt-param-scheduler; "
        "--use-checkpoint-opt-param-scheduler keeps the old one)"
    )


def _keep_rates(args: Any, saved: Any) -> str | None:
    kept = []
    for name in chain(*RATES.values()):
        given, value = getattr(args, name), getattr(saved, name)
        if given != value:
            setattr(args, name, value)
            kept.append(f"--{name.replace('_', '-')} {value}, not {given}")
    of = "--use-checkpoint-opt-param-scheduler keeps the learning rate of the checkpoint"
    return f"{of}: {', '.join(kept)}" if kept else None


def _is_same(saved: Any, args: Any, name: str) -> bool:
    """Compare a flag with that of a checkpoint, where Megatron saves it filled in."""
    value = getattr(args, name)
    if value is None:
        value = getattr(args, "weight_decay" if name in FILLED_IN else name)
    before = getattr(saved, name, None)
    if name == "lr_decay_iters" and value is None:
        return before in (None, saved.train_iters)
    if name == "lr_decay_samples" and value is None:
        return before in (None, saved.train_samples)
    return bool(before == value)


def _length(iterations: int | None, rows: int | None) -> str:
    return f"{rows:,} rows" if rows else f"{iterations or 0:,} iterations"


def find(args: Any) -> Path | None:
    """Return the folder of the checkpoint that ``--load`` and ``--ckpt-step`` mean, if any.

    A tracker that says "release" is not such a checkpoint unless a step is given.

    Raises:
        FlagError: The tracker is empty.
    """
    tracker = Path(args.load) / TRACKER if args.load else None
    if tracker is None or not tracker.is_file():
        return None
    step = args.ckpt_step or tracker.read_text().strip()
    if not step:
        there = ", ".join(sorted(p.name for p in tracker.parent.glob("iter_*"))) or "none"
        raise FlagError(
            f"{tracker} is empty: a process ended while it was written; put the number of the last "
            f"whole checkpoint into it (there: {there}; the newest may be cut short)"
        )
    return tracker.parent / (RELEASE if step == RELEASE else iteration_name(int(step)))


def state_to_resume(args: Any) -> dict[str, Any] | None:
    """Return what Megatron saved beside the tensors of the checkpoint this run goes on from.

    None for a run that goes on from none, from its weights alone, or from a checkpoint that is not
    of megasft, whose rows are not known.
    """
    folder = None if args.finetune else find(args)
    if folder is None or folder.name == RELEASE:
        return None
    state = read_state(folder)
    return state if getattr(state.get("args"), "megasft_plan", None) is not None else None


def open_checkpoint(checkpoint: Path) -> tuple[list[str], Any]:
    """Return the flags that load a checkpoint of a run, and what is saved of its flags.

    Args:
        checkpoint: A ``--save`` folder, or one checkpoint in it.

    Raises:
        FlagError: There is none, or the flags it was trained with are not in it.
    """
    load, step = checkpoint, None
    if checkpoint.name.startswith("iter_"):
        load, step = checkpoint.parent, iteration_of(checkpoint)
    folder = find(SimpleNamespace(load=load, ckpt_step=step))
    if folder is None or not folder.is_dir():
        raise FlagError(
            f"{folder or checkpoint} holds no checkpoint; give the --save folder of a run, or an "
            "iter_... folder in it"
        )
    if folder.name == RELEASE:
        raise FlagError(f"{checkpoint} is a converted model; there is no run to resume")
    saved = read_state(folder)["args"]
    if getattr(saved, "megasft_flags", None) is None:
        raise FlagError(
            f"{folder} does not hold the flags its run was started with, as checkpoints of this "
            f"megasft do; give them: megasft doctor --load {load} <flags of the run>"
        )
    return ["--load", str(load), *([] if step is None else ["--ckpt-step", str(step)])], saved


def flags_to_come(
    saved: Sequence[str], given: Sequence[str], *, without: Collection[str] = ()
) -> list[str]:
    """Return the flags a run was started with, and those that are given on top of them.

    Raises:
        FlagError: One of ``without`` is not among them.

    Example:
        >>> flags_to_come(["--lr", "1", "--train-iters", "3"], ["--megasft-epochs", "2"])
        ['--lr', '1', '--megasft-epochs', '2']
    """
    names = {word.partition("=")[0] for word in given}
    left_out = {f"--{flag.lstrip('-')}" for flag in without}
    unknown = left_out - {word.partition("=")[0] for word in saved}
    if unknown:
        raise FlagError(f"--without {' '.join(sorted(unknown))}: the run was started without it")
    left_out |= OF_ONE_START.union(*(flags for flags in EXCLUSIVE if flags & names))
    kept, is_kept = [], True
    for word in saved:
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in left_out
        if is_kept:
            kept.append(word)
    return [*kept, *given]
