"""Refuses to resume a run on rows other than those it was started with.

The position of a run is one integer, Megatron's consumed samples; it means something only on the
same row plan. So the plan's identity is saved with Megatron's flags in each checkpoint and compared
before anything is loaded. The layout (TP, PP, DP, CP) and the sizes of batches are free: rows do
not depend on them as long as ``--megasft-align-tokens`` covers the context parallelism, and dealing
rows to ranks (``row_order.py``) stays within a global batch.
"""

import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from megasft.compat import has
from megasft.errors import FlagError

logger = logging.getLogger(__name__)

TRACKER: Final = "latest_checkpointed_iteration.txt"


def check(args: Any, plan_identity: str) -> None:
    """Compare this run's row plan with the one of the checkpoint it will load, and remember it.

    Args:
        args: Megatron's flags; ``megasft_plan`` is set, so that checkpoints carry it.
        plan_identity: ``RowPlan.identity`` of the training store.

    Raises:
        FlagError: The checkpoint was trained on other rows.
    """
    args.megasft_plan = plan_identity
    _check_optimizer(args)
    saved = None if args.finetune else _saved_identity(args)
    if saved is None or saved == plan_identity:
        return
    theirs, ours = saved.split(", "), plan_identity.split(", ")
    differences = "; ".join(
        f"checkpoint: {a}, this run: {b}"
        for a, b in zip_longest(theirs, ours, fillvalue="no mixture")
        if a != b
    )
    raise FlagError(
        f"--load {args.load} was trained on other rows ({differences}), so its position means "
        "nothing here; use the same stores, --megasft-mixture, --megasft-packer, --seq-length, "
        "--seed and --megasft-align-tokens, or start anew from its weights with --finetune"
    )


def _check_optimizer(args: Any) -> None:
    """Catch what Megatron 0.19 cannot load back: its distributed optimizer over torch's Adam."""
    if not args.use_distributed_optimizer or has("transformer_engine") or has("apex"):
        return
    fact = (
        "without Transformer Engine or Apex, Megatron 0.19 cannot load a checkpoint of "
        "--use-distributed-optimizer (it asserts that torch's Adam has a step count already)"
    )
    if _has_checkpoint(args) and not (args.finetune or args.no_load_optim):
        raise FlagError(f"{fact}; drop the flag, or pass --no-load-optim to start it anew")
    if args.save:
        logger.warning("%s; a run saved to %s will not resume with its moments", fact, args.save)


def _has_checkpoint(args: Any) -> bool:
    return bool(args.load) and (Path(args.load) / TRACKER).is_file()


def _saved_identity(args: Any) -> str | None:
    from megatron.core import dist_checkpointing

    if not _has_checkpoint(args):
        return None
    newest = (Path(args.load) / TRACKER).read_text().strip()
    iteration = args.ckpt_step or newest
    if iteration == "release":
        return None
    folder = Path(args.load) / f"iter_{int(iteration):07d}"
    saved_args = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    identity = getattr(saved_args, "megasft_plan", None)
    return None if identity is None else str(identity)
