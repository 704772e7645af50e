"""What mixture-of-experts models need of a layout, and what their options cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megasft.checks.run.finding import Hit

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject


def needs_sequence_parallel(subject: Subject) -> Iterator[Hit]:
    """Find what Megatron raises in the first forward pass: experts under TP without SP."""
    args = subject.args
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield Hit(
            f"experts with --tensor-model-parallel-size {args.tensor_model_parallel_size} and "
            "without --sequence-parallel, which Megatron refuses to train",
            "add --sequence-parallel",
        )


def gathers_everything(subject: Subject) -> Iterator[Hit]:
    """Find the dispatcher that sends each token to each rank."""
    args = subject.args
    ep = args.expert_model_parallel_size
    if args.num_experts and ep > 2 and args.moe_token_dispatcher_type == "allgather":
        yield Hit(
            f"--moe-token-dispatcher-type allgather sends the tokens of {ep} expert-parallel ranks "
            f"to each of them, {ep} times what their experts need at most",
            "use --moe-token-dispatcher-type alltoall",
            {"ep": ep},
        )


def half_precision_router(subject: Subject) -> Iterator[Hit]:
    """Find routers whose choice depends on rounding."""
    args = subject.args
    if args.num_experts and (args.bf16 or args.fp16) and args.moe_router_dtype is None:
        yield Hit(
            "the router computes in 16 bits, so near ties between experts go either way",
            "add --moe-router-dtype fp32",
        )


def no_balancing(subject: Subject) -> Iterator[Hit]:
    """Say that nothing keeps experts evenly used."""
    args = subject.args
    coefficient = args.moe_aux_loss_coeff
    coefficients = coefficient if isinstance(coefficient, list) else [coefficient]
    if args.num_experts and not any(coefficients) and not args.moe_router_enable_expert_bias:
        yield Hit(
            "--moe-aux-loss-coeff is 0: nothing keeps experts evenly used, which short fine-tuning "
            "does without, and the memory estimate takes for granted",
            "",
        )
