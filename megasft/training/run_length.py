"""How long a run is, said in epochs: ``--megasft-epochs 2`` and its like become Megatron's flags.

Under packing nobody knows how many iterations an epoch is before the rows are planned, and a run
that is some percent too short trains some conversations never. A run is rounded up to whole
iterations, so each row of an epoch is trained; the last iteration then takes the first rows of the
next epoch. Warm-up needs nothing of ours: ``--lr-warmup-fraction`` is a share of the run.
"""

import argparse
import logging
import math
from typing import Any, Final

from megasft.errors import FlagError
from megasft.packing.plan import RowPlan

logger = logging.getLogger(__name__)

DEFAULT_EVAL_INTERVAL: Final = 1000
"""What our default flags give Megatron, which divides by it."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that count epochs."""
    group.add_argument(
        "--megasft-epochs",
        type=float,
        metavar="E",
        help="train E epochs, rounded up to whole iterations; instead of --train-iters and "
        "--train-samples. 0.5 is half an epoch",
    )
    group.add_argument(
        "--megasft-save-epochs",
        type=float,
        metavar="E",
        help="save a checkpoint every E epochs; instead of --save-interval",
    )
    group.add_argument(
        "--megasft-eval-epochs",
        type=float,
        metavar="E",
        help="evaluate every E epochs; instead of --eval-interval",
    )


def apply(args: Any, plan: RowPlan) -> None:
    """Set Megatron's flags from those that count epochs; before Megatron validates them.

    Args:
        args: Megatron's flags and ours; changed.
        plan: The rows of the training store.

    Raises:
        FlagError: A length is not positive, given twice, or the global batch is not known.
    """
    given = {
        "--megasft-epochs": args.megasft_epochs,
        "--megasft-save-epochs": args.megasft_save_epochs,
        "--megasft-eval-epochs": args.megasft_eval_epochs,
    }
    given = {flag: value for flag, value in given.items() if value is not None}
    for flag, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            raise FlagError(f"{flag} is {value:g}; a length is positive")
    if not given:
        return
    if args.global_batch_size is None and not args.step_batch_size_schedule:
        raise FlagError(f"{next(iter(given))} needs --global-batch-size N; add it")
    if args.megasft_epochs is not None:
        _set_length(args, plan)
    if args.megasft_save_epochs is not None:
        _require_fixed_batches(args, "--megasft-save-epochs")
        if args.save_interval is not None:
            raise FlagError("--megasft-save-epochs and --save-interval exclude each other")
        args.save_interval = _iterations(args, plan, args.megasft_save_epochs)
    if args.megasft_eval_epochs is not None:
        _require_fixed_batches(args, "--megasft-eval-epochs")
        if args.eval_interval != DEFAULT_EVAL_INTERVAL:
            raise FlagError("--megasft-eval-epochs and --eval-interval exclude each other")
        args.eval_interval = _iterations(args, plan, args.megasft_eval_epochs)


def _set_length(args: Any, plan: RowPlan) -> None:
    for flag in ("train_iters", "train_samples"):
        if getattr(args, flag) is not None:
            raise FlagError(f"--megasft-epochs and --{flag.replace('_', '-')} exclude each other")
    rows = plan.epoch_rows * args.megasft_epochs
    if args.step_batch_size_schedule:
        args.train_samples = math.ceil(rows - 1e-9)
        logger.info(
            "%g epochs of %s rows are %s rows (--train-samples)",
            *(args.megasft_epochs, _count(plan.epoch_rows), f"{args.train_samples:,}"),
        )
        return
    args.train_iters = _iterations(args, plan, args.megasft_epochs)
    more = args.train_iters * args.global_batch_size - rows
    logger.info(
        "%g epochs of %s rows are %s iterations of %s (--train-iters); the last takes %s rows "
        "more, from the epoch after",
        *(args.megasft_epochs, _count(plan.epoch_rows), f"{args.train_iters:,}"),
        *(f"{args.global_batch_size:,}", _count(more)),
    )


def _iterations(args: Any, plan: RowPlan, epochs: float) -> int:
    """Return the iterations that hold so many epochs; one at least."""
    iterations = plan.epoch_rows * epochs / int(args.global_batch_size)
    return max(1, math.ceil(iterations - 1e-9))  # 0.1 * 30 / 3 is 1, not 1.0000000000000002


def _require_fixed_batches(args: Any, flag: str) -> None:
    if args.step_batch_size_schedule:
        raise FlagError(
            f"{flag} counts iterations of one size, and --step-batch-size-schedule changes it; "
            "give iterations instead"
        )


def _count(rows: float) -> str:
    return f"{rows:,.0f}" if float(rows).is_integer() else f"{rows:,.1f}"
