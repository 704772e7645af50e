"""Whether ranks, layers, heads, experts, batches and rows fit the layout and the model.

Megatron asserts most of these, some with a bare number, some only after all ranks have met. Here
they are asked before anything starts, of the flags as parsed. Foreseen of Megatron 0.19.2:
``validate_args`` (world size, pipeline and virtual stages, micro-batch size, evaluation batches,
experts per rank), ``TransformerConfig`` (heads, query groups), ``parallel_state`` (expert layout),
``num_microbatches_calculator`` (global batch), and the column- and row-parallel layers (widths).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run.flags import flag_of
from megasft.checks.run.subject import Stage, Subject
from megasft.megatron.flags import attention_backend


@rule("world-size", Severity.ERROR, Stage.FLAGS, theme="layout")
def world_size(subject: Subject) -> Iterator[Finding]:
    """TP x PP x CP does not divide the ranks."""
    args = subject.args
    tp, pp, cp = model_parallel(args)
    if args.world_size % (tp * pp * cp):
        yield Finding(
            f"the world size of {args.world_size} ranks is no multiple of {tp * pp * cp} = TP {tp} "
            f"x PP {pp} x CP {cp}, the ranks of one copy of the model",
            f"start {_next(args.world_size, tp * pp * cp)} ranks, or split the model less",
            {"world_size": args.world_size, "model_ranks": tp * pp * cp},
        )


@rule("expert-world-size", Severity.ERROR, Stage.FLAGS, theme="layout")
def expert_world_size(subject: Subject) -> Iterator[Finding]:
    """EP x ETP x PP does not divide the ranks."""
    args = subject.args
    if not args.num_experts:
        return
    tp, pp, _ = model_parallel(args)
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tp
    if args.world_size % (ep * etp * pp):
        yield Finding(
            f"the world size of {args.world_size} ranks is no multiple of {ep * etp * pp} = EP "
            f"{ep} x ETP {etp} x PP {pp}, the ranks of one copy of the experts",
            f"start {_next(args.world_size, ep * etp * pp)} ranks, or pass "
            "--expert-tensor-parallel-size 1 (its default is TP)",
            {"world_size": args.world_size, "expert_ranks": ep * etp * pp},
        )


@rule("experts", Severity.ERROR, Stage.FLAGS, theme="layout")
def experts(subject: Subject) -> Iterator[Finding]:
    """EP does not divide the experts, or there are none."""
    args = subject.args
    ep = args.expert_model_parallel_size
    if ep > 1 and not args.num_experts:
        yield Finding(
            f"--expert-model-parallel-size {ep}, and the model has no experts", "drop the flag"
        )
    elif ep > 1 and args.num_experts % ep:
        yield Finding(
            f"--expert-model-parallel-size {ep} does not divide {args.num_experts} experts",
            f"use one of {_divisors(args.num_experts)}",
            {"num_experts": args.num_experts},
        )


@rule("heads", Severity.ERROR, Stage.FLAGS, theme="layout")
def heads(subject: Subject) -> Iterator[Finding]:
    """TP does not divide attention heads or query groups."""
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
        yield Finding(
            f"--tensor-model-parallel-size {tp} does not divide {num_heads} attention heads",
            *(remedy, numbers),
        )
    elif tp not in fitting:
        yield Finding(
            f"--tensor-model-parallel-size {tp} neither divides {groups} query groups nor is a "
            "multiple of them",
            *(remedy, numbers),
        )


@rule("head-groups", Severity.ERROR, Stage.FLAGS, theme="layout")
def head_groups(subject: Subject) -> Iterator[Finding]:
    """Heads, query groups and hidden size do not divide."""
    args = subject.args
    groups = args.num_query_groups
    if (
        args.group_query_attention
        and args.num_attention_heads
        and args.num_attention_heads % groups
    ):
        yield Finding(
            f"{groups} query groups do not divide {args.num_attention_heads} attention heads",
            "mend --num-query-groups; --megasft-hf sets both from the model",
        )
    derived = args.hidden_size and args.num_attention_heads and args.kv_channels is None
    if derived and args.hidden_size % args.num_attention_heads:
        yield Finding(
            f"{args.num_attention_heads} attention heads do not divide --hidden-size "
            f"{args.hidden_size}",
            "give --kv-channels, or mend one of them",
        )


@rule("widths", Severity.ERROR, Stage.FLAGS, theme="layout")
def widths(subject: Subject) -> Iterator[Finding]:
    """TP or ETP does not divide a width."""
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
            yield Finding(
                f"{kind} parallelism of {size} does not divide {flag_of(name)} {width}",
                f"use one of {_divisors(math.gcd(width, 64))}",
                {name: width, "tp": size},
            )


@rule("layers", Severity.ERROR, Stage.FLAGS, theme="layout")
def layers(subject: Subject) -> Iterator[Finding]:
    """Pipeline stages, or virtual ones, do not divide the layers."""
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
        yield Finding(
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
        yield Finding(
            f"{asked} does not divide the {per_stage} layers of a pipeline stage",
            f"use one of {_divisors(per_stage)}",
            {"layers_per_stage": per_stage},
        )


@rule("global-batch", Severity.ERROR, Stage.FLAGS, theme="layout")
def global_batch(subject: Subject) -> Iterator[Finding]:
    """Ranks cannot share a global batch in whole micro-batches."""
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
            yield Finding(
                f"{flag_of(batch_name)} {batch} is no multiple of {micro * dp} = "
                f"{flag_of(micro_name)} {micro} x {dp} data-parallel ranks "
                f"({args.world_size} ranks / TP {tp} x PP {pp} x CP {cp})",
                f"use {_next(batch, micro * dp)}",
                {batch_name: batch, micro_name: micro, "dp": dp},
            )


@rule("moe-sequence-parallel", Severity.ERROR, Stage.FLAGS, theme="layout")
def needs_sequence_parallel(subject: Subject) -> Iterator[Finding]:
    """Experts under TP without --sequence-parallel.

    Megatron raises in the first forward pass.
    """
    args = subject.args
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield Finding(
            f"experts with --tensor-model-parallel-size {args.tensor_model_parallel_size} and "
            "without --sequence-parallel, which Megatron refuses to train",
            "add --sequence-parallel",
        )


@rule("no-sequence-parallel", Severity.NOTE, Stage.FLAGS, theme="layout")
def no_sequence_parallel(subject: Subject) -> Iterator[Finding]:
    """TP without --sequence-parallel."""
    args = subject.args
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.num_experts:
        yield Finding(
            f"TP {args.tensor_model_parallel_size} without --sequence-parallel: norms are computed "
            "and their inputs kept on each of these ranks",
            "add --sequence-parallel; the loss is the same",
        )


@rule("moe-dispatcher", Severity.WARNING, Stage.FLAGS, theme="layout")
def gathers_everything(subject: Subject) -> Iterator[Finding]:
    """Experts' tokens are sent to every rank."""
    args = subject.args
    ep = args.expert_model_parallel_size
    if args.num_experts and ep > 2 and args.moe_token_dispatcher_type == "allgather":
        yield Finding(
            f"--moe-token-dispatcher-type allgather sends the tokens of {ep} expert-parallel ranks "
            f"to each of them, {ep} times what their experts need at most",
            "use --moe-token-dispatcher-type alltoall",
            {"ep": ep},
        )


@rule("moe-router-precision", Severity.WARNING, Stage.FLAGS, theme="model")
def half_precision_router(subject: Subject) -> Iterator[Finding]:
    """The router computes in 16 bits."""
    args = subject.args
    if args.num_experts and (args.bf16 or args.fp16) and args.moe_router_dtype is None:
        yield Finding(
            "the router computes in 16 bits, so near ties between experts go either way",
            "add --moe-router-dtype fp32",
        )


@rule("moe-unbalanced", Severity.NOTE, Stage.FLAGS, theme="model")
def no_balancing(subject: Subject) -> Iterator[Finding]:
    """Nothing keeps experts evenly used."""
    args = subject.args
    coefficient = args.moe_aux_loss_coeff
    coefficients = coefficient if isinstance(coefficient, list) else [coefficient]
    if args.num_experts and not any(coefficients) and not args.moe_router_enable_expert_bias:
        yield Finding(
            "--moe-aux-loss-coeff is 0: nothing keeps experts evenly used, which short fine-tuning "
            "does without, and the memory estimate takes for granted",
            "",
        )


@rule("row-over-positions", Severity.ERROR, Stage.FLAGS, theme="model")
def row_over_positions(subject: Subject) -> Iterator[Finding]:
    """Rows are longer than --max-position-embeddings.

    Megatron asserts it of the whole row.
    """
    args = subject.args
    most = args.max_position_embeddings
    if most is None or args.seq_length is None or args.seq_length <= most:
        return
    why = (
        "with rope it limits nothing else: positions start anew in each document"
        if args.position_embedding_type == "rope"
        else "its embedding has that many rows; only rope goes further"
    )
    yield Finding(
        f"--seq-length {args.seq_length} is above --max-position-embeddings {most}, and Megatron "
        f"refuses that ({why})",
        f"add --max-position-embeddings {args.seq_length} behind --megasft-hf, or shorten rows"
        if args.position_embedding_type == "rope"
        else f"use --seq-length {most} or less",
        {"seq_length": args.seq_length, "max_position_embeddings": most},
    )


@rule("row-of-one", Severity.ERROR, Stage.FLAGS, theme="layout")
def row_of_one(subject: Subject) -> Iterator[Finding]:
    """Context parallelism leaves a row no second document."""
    args = subject.args
    cp, row = args.context_parallel_size, args.seq_length
    if cp > 1 and row and row < 4 * cp:
        yield Finding(
            f"a row of {row} tokens holds one document at most: --context-parallel-size {cp} pads "
            f"each to a multiple of {2 * cp}",
            "lengthen --seq-length to thousands of tokens a rank, or drop context parallelism, "
            "which is for rows that do not fit one GPU",
            {"row_tokens": row, "align_tokens": 2 * cp},
        )


@rule("heads-to-exchange", Severity.ERROR, Stage.FLAGS, theme="model")
def heads_to_exchange(subject: Subject) -> Iterator[Finding]:
    """All-to-all context parallelism cannot deal out the heads."""
    args = subject.args
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    if cp == 1 or attention_backend(args) is not None or not args.num_attention_heads:
        return
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if "a2a" in args.cp_comm_type and (groups // tp) % cp:
        yield Finding(
            f"--cp-comm-type a2a deals the {max(groups // tp, 1)} key heads of a rank to "
            f"{cp} context-parallel ranks, which does not come out even",
            "use --cp-comm-type p2p, or a CP that divides them",
            {"heads": groups // tp, "cp": cp},
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
