"""Whether ranks, layers, heads, experts and batches divide as the layout asks.

Megatron asserts most of these, some with a bare number, some only after all ranks have met. Here
they are asked before anything starts, of the flags as parsed. Foreseen of Megatron 0.19.2:
``validate_args`` (world size, pipeline and virtual stages, micro-batch size, evaluation batches,
experts per rank), ``TransformerConfig`` (heads, query groups), ``parallel_state`` (expert layout),
``num_microbatches_calculator`` (global batch), and the column- and row-parallel layers (widths).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megasft.checks.run.finding import Hit

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject

_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "micro_batch_size"),
    *("global_batch_size", "seq_length", "num_layers", "hidden_size", "num_attention_heads"),
    *("ffn_hidden_size", "num_query_groups", "world_size", "megasft_align_tokens"),
)


def flag_of(name: str) -> str:
    """Return the flag of one of Megatron's attributes.

    Example:
        >>> flag_of("seq_length")
        '--seq-length'
    """
    return "--" + name.replace("_", "-")


def sizes_are_positive(args: Any) -> bool:
    """Say whether other rules may divide by the sizes."""
    return all((getattr(args, name) is None or getattr(args, name) > 0) for name in _SIZES)


def not_positive(subject: Subject) -> Iterator[Hit]:
    """Find sizes below 1."""
    for name in _SIZES:
        value = getattr(subject.args, name)
        if value is not None and value < 1:
            yield Hit(f"{flag_of(name)} is {value}", "a size is 1 at least", {name: value})


def world_size(subject: Subject) -> Iterator[Hit]:
    """Find ranks that the model-parallel layout does not divide."""
    args = subject.args
    tp, pp, cp = model_parallel(args)
    if args.world_size % (tp * pp * cp):
        yield Hit(
            f"the world size of {args.world_size} ranks is no multiple of {tp * pp * cp} = TP {tp} "
            f"x PP {pp} x CP {cp}, the ranks of one copy of the model",
            f"start {_next(args.world_size, tp * pp * cp)} ranks, or split the model less",
            {"world_size": args.world_size, "model_ranks": tp * pp * cp},
        )


def expert_world_size(subject: Subject) -> Iterator[Hit]:
    """Find ranks that the experts' layout does not divide."""
    args = subject.args
    if not args.num_experts:
        return
    tp, pp, _ = model_parallel(args)
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tp
    if args.world_size % (ep * etp * pp):
        yield Hit(
            f"the world size of {args.world_size} ranks is no multiple of {ep * etp * pp} = EP "
            f"{ep} x ETP {etp} x PP {pp}, the ranks of one copy of the experts",
            f"start {_next(args.world_size, ep * etp * pp)} ranks, or pass "
            "--expert-tensor-parallel-size 1 (its default is TP)",
            {"world_size": args.world_size, "expert_ranks": ep * etp * pp},
        )


def experts(subject: Subject) -> Iterator[Hit]:
    """Find experts that EP does not divide, or EP without experts."""
    args = subject.args
    ep = args.expert_model_parallel_size
    if ep > 1 and not args.num_experts:
        yield Hit(
            f"--expert-model-parallel-size {ep}, and the model has no experts", "drop the flag"
        )
    elif ep > 1 and args.num_experts % ep:
        yield Hit(
            f"--expert-model-parallel-size {ep} does not divide {args.num_experts} experts",
            f"use one of {_divisors(args.num_experts)}",
            {"num_experts": args.num_experts},
        )


def heads(subject: Subject) -> Iterator[Hit]:
    """Find attention heads and query groups that TP does not divide."""
    args = subject.args
    tp, num_heads = args.tensor_model_parallel_size, args.num_attention_heads
    if not num_heads:
        return
    groups = args.num_query_groups if args.group_query_attention else num_heads
    fitting = [
        size
        for size in range(1, num_heads + 1)
        if not num_heads % size and (not groups % size or not size % groups)
    ]
    remedy = f"use one of {', '.join(map(str, fitting))}"
    numbers = {"num_attention_heads": num_heads, "num_query_groups": groups, "tp": tp}
    if num_heads % tp:
        yield Hit(
            f"--tensor-model-parallel-size {tp} does not divide {num_heads} attention heads",
            *(remedy, numbers),
        )
    elif tp not in fitting:
        yield Hit(
            f"--tensor-model-parallel-size {tp} neither divides {groups} query groups nor is a "
            "multiple of them",
            *(remedy, numbers),
        )


def head_groups(subject: Subject) -> Iterator[Hit]:
    """Find query heads that do not share keys evenly."""
    args = subject.args
    groups = args.num_query_groups
    if (
        args.group_query_attention
        and args.num_attention_heads
        and args.num_attention_heads % groups
    ):
        yield Hit(
            f"{groups} query groups do not divide {args.num_attention_heads} attention heads",
            "mend --num-query-groups; --megasft-hf sets both from the model",
        )
    derived = args.hidden_size and args.num_attention_heads and args.kv_channels is None
    if derived and args.hidden_size % args.num_attention_heads:
        yield Hit(
            f"{args.num_attention_heads} attention heads do not divide --hidden-size "
            f"{args.hidden_size}",
            "give --kv-channels, or mend one of them",
        )


def widths(subject: Subject) -> Iterator[Hit]:
    """Find widths of MLPs and experts that their tensor parallelism does not divide."""
    args = subject.args
    tp = args.tensor_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    looked_at = {
        "hidden_size": tp if args.sequence_parallel else 1,
        "ffn_hidden_size": tp,
        "moe_ffn_hidden_size": etp if args.num_experts else 1,
        "moe_shared_expert_intermediate_size": tp if args.num_experts else 1,
    }
    for name, size in looked_at.items():
        width = getattr(args, name)
        if width and width % size:
            kind = "expert tensor" if name == "moe_ffn_hidden_size" else "tensor"
            yield Hit(
                f"{kind} parallelism of {size} does not divide {flag_of(name)} {width}",
                f"use one of {_divisors(math.gcd(width, 64))}",
                {name: width, "tp": size},
            )


def layers(subject: Subject) -> Iterator[Hit]:
    """Find layers that pipeline stages, or their virtual stages, do not divide."""
    args = subject.args
    pp, num_layers = args.pipeline_model_parallel_size, args.num_layers
    named = (
        *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers"),
        *("decoder_last_pipeline_num_layers", "hybrid_layer_pattern"),
    )
    if not num_layers or any(getattr(args, name) is not None for name in named):
        return
    extra = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    counted = f"{num_layers} layers" + (f" and {extra} counted besides" if extra else "")
    total = num_layers + extra
    if total % pp:
        yield Hit(
            f"--pipeline-model-parallel-size {pp} does not divide {counted}",
            f"use one of {_divisors(total)}, or give the ends other numbers of layers with "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
            {"num_layers": total, "pp": pp},
        )
        return
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    per_stage = total // pp
    chunks = args.num_virtual_stages_per_pipeline_rank
    if (per_chunk and per_stage % per_chunk) or (chunks and per_stage % chunks):
        asked = (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk}"
            if per_chunk
            else f"--num-virtual-stages-per-pipeline-rank {chunks}"
        )
        yield Hit(
            f"{asked} does not divide the {per_stage} layers of a pipeline stage",
            f"use one of {_divisors(per_stage)}",
            {"layers_per_stage": per_stage},
        )


def global_batch(subject: Subject) -> Iterator[Hit]:
    """Find global batches that data-parallel ranks cannot share in whole micro-batches."""
    args = subject.args
    tp, pp, cp = model_parallel(args)
    dp = args.world_size // (tp * pp * cp)
    if args.world_size % (tp * pp * cp) or not dp:
        return  # world-size says it
    pairs = [("global_batch_size", "micro_batch_size")]
    if args.eval_global_batch_size or args.eval_micro_batch_size:
        pairs.append(("eval_global_batch_size", "eval_micro_batch_size"))
    for batch_name, micro_name in pairs:
        batch = getattr(args, batch_name) or args.global_batch_size
        micro = getattr(args, micro_name) or args.micro_batch_size
        if not batch or not micro or args.rampup_batch_size or args.decrease_batch_size_if_needed:
            continue
        if batch % (micro * dp):
            yield Hit(
                f"{flag_of(batch_name)} {batch} is no multiple of {micro * dp} = "
                f"{flag_of(micro_name)} {micro} x {dp} data-parallel ranks "
                f"({args.world_size} ranks / TP {tp} x PP {pp} x CP {cp})",
                f"use {_next(batch, micro * dp)}",
                {batch_name: batch, micro_name: micro, "dp": dp},
            )


def no_sequence_parallel(subject: Subject) -> Iterator[Hit]:
    """Find tensor parallelism that keeps a copy of the residual stream on each rank."""
    args = subject.args
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.num_experts:
        yield Hit(
            f"TP {args.tensor_model_parallel_size} without --sequence-parallel: norms are computed "
            "and their inputs kept on each of these ranks",
            "add --sequence-parallel; the loss is the same",
        )


def model_parallel(args: Any) -> tuple[int, int, int]:
    """Return TP, PP and CP."""
    return (
        int(args.tensor_model_parallel_size),
        int(args.pipeline_model_parallel_size),
        int(args.context_parallel_size),
    )


def _next(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
