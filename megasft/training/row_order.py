"""In which order a run trains its rows: the plan's order, each global batch dealt to ranks by cost.

With ``--megasft-cost-window`` neighbouring global batches are sorted by cost before that.

The deal needs to know where global batches start. That follows from the consumed samples Megatron
resumes at and one batch size, so with a batch size that changes during the run rows are trained
where they come, and the log says so. Computing the schedule here was rejected: it is Megatron's, in
two flags, and a ramp-up is short.
"""

import logging
from typing import Any

from megasft.errors import FlagError
from megasft.packing.balance import BatchShape, Cost, DealtOrder, cost_of_model
from megasft.packing.cost_window import CostWindow
from megasft.packing.forecast import Run, balance_of
from megasft.packing.order import RowAtPosition
from megasft.packing.plan import RowPlan

logger = logging.getLogger(__name__)


def cost_window(args: Any) -> CostWindow | None:
    """Return how far ``--megasft-cost-window`` lets rows move; None without it.

    Raises:
        FlagError: A window needs global batches of one known size.
    """
    if not args.megasft_cost_window:
        return None
    if args.step_batch_size_schedule:
        raise FlagError(
            "--megasft-cost-window sorts whole global batches, and --step-batch-size-schedule "
            "moves their edges during the run; drop one of the two"
        )
    if args.global_batch_size is None:
        raise FlagError("--megasft-cost-window needs --global-batch-size N; add it")
    return CostWindow(args.megasft_cost_window, args.global_batch_size)


def identity(plan: RowPlan, window: CostWindow | None) -> str:
    """Return everything a position of the run depends on, readable."""
    return plan.identity if window is None else f"{plan.identity}, {window.identity}"


def training_order(args: Any, plan: RowPlan, shape: BatchShape) -> RowAtPosition:
    """Return the row at each position of the run, from Megatron's consumed samples on.

    Args:
        args: Megatron's flags, after a checkpoint was loaded.
        plan: The rows of the training store.
        shape: Of the global batches to come.
    """
    order = plan.order(seed=args.seed, window=cost_window(args))
    if why_not_dealt(args) is not None:
        return order
    costs = cost_of(args).of(plan.row_tokens, plan.squares)
    return DealtOrder(order, costs, shape, start=int(args.consumed_train_samples))


def why_not_dealt(args: Any) -> str | None:
    """Return why rows are trained where they come; None when they are dealt."""
    if args.megasft_no_balance:
        return "--megasft-no-balance is given"
    if args.step_batch_size_schedule:
        return "--step-batch-size-schedule moves the edges of global batches"
    return None


def cost_of(args: Any) -> Cost:
    """Return the cost of a document to Megatron's model.

    Experts are counted in every layer, and multi-latent attention as plain attention: only the
    ratio of the two costs matters, and a deal by a ratio somewhat off is still a good one.
    """
    heads, channels = args.num_attention_heads, args.kv_channels
    key_heads = args.num_query_groups if args.group_query_attention else heads
    ffn_size = args.ffn_hidden_size
    if args.num_experts:
        ffn_size = (args.moe_ffn_hidden_size or ffn_size) * args.moe_router_topk
        ffn_size += args.moe_shared_expert_intermediate_size or 0
    return cost_of_model(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        attention_size=heads * channels,
        key_value_size=key_heads * channels,
        mlp_weights=(3 if args.swiglu else 2) * args.hidden_size * ffn_size,
        vocab_size=args.padded_vocab_size,
    )


def announce(args: Any, plan: RowPlan) -> None:
    """Say how even the work of several ranks will be, or why rows are not dealt."""
    window = cost_window(args)
    if window is not None:
        logger.info(
            "cost window: rows are sorted by cost over %d global batches of %d, so what makes a "
            "batch is no random sample of the data any more",
            *window,
        )
    why_not = why_not_dealt(args)
    if why_not is not None:
        logger.info("balance: rows are trained where they come, since %s", why_not)
        return
    if args.data_parallel_size == 1:
        return
    per_pass = args.data_parallel_size * args.micro_batch_size
    shape = BatchShape(
        global_batch_size=max(1, args.global_batch_size // per_pass) * per_pass,
        dp_size=args.data_parallel_size,
        micro_batch_size=args.micro_batch_size,
    )
    run = Run(shape, args.seed, window=window)
    balance = balance_of(plan, run, cost_of(args).of(plan.row_tokens, plan.squares))
    assert balance is not None, "several ranks, whole global batches"
    logger.info(
        "balance: the slowest of %d data-parallel ranks takes %.3f times the mean of them, and "
        "%.3f times without the deal (%d global batches)",
        *(args.data_parallel_size, balance.after.mean(), balance.before.mean()),
        len(balance.after),
    )
