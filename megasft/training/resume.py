"""Refuses to resume a run on rows other than those it was started with.

The position of a run is one integer, Megatron's consumed samples; it means something only on the
same row plan. So the plan's identity is saved with Megatron's flags in each checkpoint and compared
before anything is loaded. The layout (TP, PP, DP, CP) and the sizes of batches are free: rows do
not depend on them as long as ``--megasft-align-tokens`` covers the context parallelism, and dealing
rows to ranks (``row_order.py``) stays within a global batch. ``run/resume_check.py`` shows that for
one checkpoint and one run to come.
"""

import logging
import re
from pathlib import Path
from typing import Any, Final

from megasft.compat import has
from megasft.errors import FlagError
from megasft.training.retention import TRACKER, iteration_name

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


def check(args: Any, plan_identity: str) -> list[str]:
    """Compare this run's row plan with the one of the checkpoint it will load, and remember it.

    Args:
        args: Megatron's flags; ``megasft_plan`` is set, so that checkpoints carry it.
        plan_identity: ``row_order.identity`` of the training store.

    Returns:
        What there is to warn of, in sentences.

    Raises:
        FlagError: The checkpoint was trained on other rows, or cannot be continued.
    """
    args.megasft_plan = plan_identity
    warnings = _check_optimizer(args)
    state = None if args.finetune else _saved_state(args)
    saved = None if state is None else identity_in(state)
    if state is None or saved is None:
        return warnings
    _check_form_of_moments(args, state["args"])
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


def follow_new_length(args: Any) -> None:
    """Let a run that is made longer go on: by the learning-rate schedule of its new length.

    Megatron asserts that the schedule is that of the checkpoint, which its length is part of,
    unless one of two flags says which of them holds. A run that changes more than its length is
    left to these flags.

    Args:
        args: Megatron's flags, not validated yet; ``override_opt_param_scheduler`` may be set.
    """
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    starts_again = args.finetune or args.no_load_optim or args.skip_train
    state = None if starts_again else _saved_state(args)
    if state is None or identity_in(state) is None:
        return
    saved = state["args"]
    before, now = (
        [getattr(of, name, None) for name in ("train_iters", "train_samples")]
        for of in (saved, args)
    )
    # Megatron fills train_iters in from train_samples before it saves.
    is_other_length = before[1:] != now[1:] if now[1] else before != now
    if not is_other_length or not all(_is_same(saved, args, name) for name in SCHEDULE):
        return
    args.override_opt_param_scheduler = True
    logger.info(
        "the run was %s long and is %s now: its learning rate follows the schedule of the new "
        "length (--override-opt-param-scheduler; --use-checkpoint-opt-param-scheduler keeps the "
        "old one)",
        *(_length(*before), _length(*now)),
    )


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


def read_state(folder: Path) -> dict[str, Any]:
    """Return what Megatron saved beside the tensors: flags, iteration, learning-rate schedule.

    Args:
        folder: Of one checkpoint, ``iter_0000100``.
    """
    from megatron.core import dist_checkpointing

    state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    return state


def identity_in(state: dict[str, Any]) -> str | None:
    """Return the identity of the rows a checkpoint was trained on; None if megasft saved none."""
    identity = getattr(state.get("args"), "megasft_plan", None)
    return None if identity is None else str(identity)


def _saved_state(args: Any) -> dict[str, Any] | None:
    folder = find(args)
    return None if folder is None or folder.name == RELEASE else read_state(folder)
