"""How much memory a GPU needs for the run: an estimate of every part, for the fullest rank.

Weights, gradients and optimizer states follow from the parameter count. Activations are what a
layer keeps for its backward pass, tensor by tensor, which for a plain layer of 16-bit GPT is the
``34 s b h`` of Korthikanti et al. 2022 (arXiv:2205.05198, section 4; 32 without dropout) once the
square of attention is gone, as it is with every attention here but ``reference``.

Megatron's own estimate (``theoretical_memory_usage.py``) takes that formula for any model, so it
knows no context parallelism, no grouped or latent attention, no experts and one of the kinds of
recomputation, and spreads the distributed optimizer over data-parallel ranks without those of
context parallelism, over which Megatron does spread it. Its rules for micro-batches in flight and
bytes per parameter are used.

What it leaves out: the sizes of experts' batches when routing is uneven, communication buffers
beyond the reserve, and FSDP, for which there is no estimate. Measured on a GPU it has not been.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run import parameters
from megasft.checks.run.parameters import Counts, StageCounts, text_of_count
from megasft.checks.run.subject import Stage, Subject
from megasft.megatron import cpu
from megasft.megatron.flags import attention_backend

GIB: Final = 2**30
RESERVE: Final = 3 * GIB
"""CUDA's context, NCCL's buffers, cuBLAS' workspace: assumed, not computed."""

FRAGMENTATION: Final = 0.05
"""Of everything else, as Megatron's own estimate adds."""

FULL: Final = 0.95
"""Part of a GPU's memory above which a run will not fit, or hardly."""


class Part(NamedTuple):
    """One part of the memory.

    Attributes:
        name: What is held.
        num_bytes: On one GPU.
        how: The formula with its numbers.
    """

    name: str
    num_bytes: float
    how: str


class Estimate(NamedTuple):
    """Memory of a rank of one pipeline stage.

    Attributes:
        stage: Which.
        parts: What it is made of.
    """

    stage: int
    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        """Sum of the parts, in bytes."""
        return sum(part.num_bytes for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Return the estimate for programs."""
        return {
            "stage": self.stage,
            "total": self.total,
            "parts": [p._asdict() for p in self.parts],
        }


def estimate(args: Any, config: Any) -> Estimate | None:
    """Estimate the memory of the fullest pipeline stage; None under FSDP.

    Args:
        args: Validated flags.
        config: Megatron's ``TransformerConfig``.
    """
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        return None
    stages = parameters.of_stages(args, config)
    estimates = [of_stage(args, config, stage, number) for number, stage in enumerate(stages)]
    return max(estimates, key=lambda each: each.total)


def of_stage(args: Any, config: Any, stage: StageCounts, number: int) -> Estimate:
    """Estimate the memory of a rank of one stage."""
    parts = [*_states(args, stage.counts), *_activations(args, config, stage, number)]
    held = sum(part.num_bytes for part in parts)
    parts.append(
        Part(
            "reserve",
            RESERVE + FRAGMENTATION * held,
            f"{RESERVE / GIB:.0f} GiB for CUDA, NCCL and cuBLAS, and "
            f"{100 * FRAGMENTATION:.0f} % for fragments (assumed)",
        )
    )
    return Estimate(number, tuple(parts))


def bytes_per_parameter(args: Any) -> dict[str, tuple[float, bool]]:
    """Return what Megatron keeps per parameter: its bytes, and whether ranks share it.

    Source: Megatron-Core's guide to the distributed optimizer; ``optimizer/optimizer.py`` of
        0.19.2. Ranks share with ``--use-distributed-optimizer``.
    """
    is_half = bool(args.bf16 or args.fp16)
    precise = args.use_precision_aware_optimizer
    sizes = {
        name: (getattr(args, f"{name}_dtype").itemsize if precise else 4)
        for name in ("main_params", "exp_avg", "exp_avg_sq")
    }
    momentum = 4 if args.sgd_momentum else 0
    states = momentum if args.optimizer == "sgd" else sizes["exp_avg"] + sizes["exp_avg_sq"]
    masters = sizes["main_params"] if is_half else 0
    if args.optimizer_cpu_offload:
        states *= 1 - args.optimizer_offload_fraction
        masters *= 1 - args.optimizer_offload_fraction
    gradients = 4 if args.accumulate_allreduce_grads_in_fp32 or not is_half else 2
    shared = bool(args.use_distributed_optimizer)
    return {
        "weights": (2 if is_half else 4, False),
        "gradients": (gradients, False),
        "optimizer": (masters + states, shared),
    }


def sharing_ranks(args: Any) -> tuple[int, int]:
    """Return over how many ranks the distributed optimizer spreads dense and expert states."""
    copies = args.num_distributed_optimizer_instances or 1
    dense = args.data_parallel_size * args.context_parallel_size
    split = parameters.split_of(args)
    expert = args.world_size // (split.ep * split.etp * args.pipeline_model_parallel_size)
    if split.ep == 1:
        expert = dense  # Megatron treats them as dense weights then
    return max(1, dense // copies), max(1, expert // copies)


def _states(args: Any, counts: Counts) -> Iterator[Part]:
    ranks = sharing_ranks(args)
    for name, (size, is_shared) in bytes_per_parameter(args).items():
        over = ranks if is_shared else (1, 1)
        num_bytes = sum(size * n / by for n, by in zip(counts, over, strict=True))
        spread = f" / {over[0]}" if max(over) > 1 else ""
        spread += f" (experts / {over[1]})" if max(over) > 1 and counts.expert else ""
        yield Part(
            name, num_bytes, f"{text_of_count(counts.total)} parameters x {size:g} B{spread}"
        )


def _activations(args: Any, config: Any, stage: StageCounts, number: int) -> Iterator[Part]:
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    pp = args.pipeline_model_parallel_size
    element = 2 if args.bf16 or args.fp16 else 4
    in_flight, chunks = (
        chunks_in_flight(args, number),
        args.virtual_pipeline_model_parallel_size or 1,
    )
    kinds = {False: stage.num_dense_layers, True: stage.num_moe_layers}
    of_layer = {
        is_moe: element * tokens * sum(kept_per_token(args, config, is_moe=is_moe).values())
        for is_moe, num in kinds.items()
        if num
    }
    num_layers = sum(kinds.values())
    whole = sum(kinds[is_moe] * num_bytes for is_moe, num_bytes in of_layer.items())
    stream = element * tokens * args.hidden_size / _stream_ranks(args)
    kept, how = _after_recomputation(args, whole=whole, stream=stream, num_layers=num_layers)
    yield Part(
        "activations",
        kept / chunks * in_flight + (stream * in_flight if number == 0 else 0),
        f"{num_layers} layers x {tokens:,} tokens, {how}"
        + (f"; micro-batches in flight: {in_flight / chunks:g}" if pp > 1 else ""),
    )
    if num_layers:
        dearest = max(of_layer.values())
        yield Part("working layer", dearest, "gradients, or recomputed activations, of one layer")
    yield from _attention_scores(args, tokens)
    if number == pp - 1:
        yield _logits(args, tokens, element)


def chunks_in_flight(args: Any, stage: int) -> int:
    """Return how many micro-batches, of each virtual chunk, a stage holds activations of at most.

    Source: ``pipeline_parallel/schedules.py`` of 0.19.2: warm-up micro-batches and one more.
    """
    pp = args.pipeline_model_parallel_size
    chunks = args.virtual_pipeline_model_parallel_size or 1
    num = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if pp == 1:
        return 1
    if chunks == 1:
        return int(min(num, pp - stage))
    return int(min(num * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp + 1))


def kept_per_token(args: Any, config: Any, *, is_moe: bool) -> dict[str, float]:
    """Return the numbers a layer keeps per token of a rank's share, by what they are.

    Args:
        args: Validated flags.
        config: Megatron's ``TransformerConfig``; it names the recomputed modules.
        is_moe: Whether the layer has experts.
    """
    tp, stream = args.tensor_model_parallel_size, args.hidden_size / _stream_ranks(args)
    query, key, value = (size / tp for size in parameters.attention_sizes(args))
    kept = {
        "inputs of the norms": 2 * stream,
        "inputs of attention and MLP": 2 * stream,
        "queries, keys, values": query + key + value,
        "attention's output": value if args.multi_latent_attention else query,
    }
    if args.multi_latent_attention:
        ranks = (args.q_lora_rank or 0) + args.kv_lora_rank
        kept["latent queries, keys, values"] = 2 * ranks + args.num_attention_heads / tp * (
            args.qk_head_dim
        )
    elif args.qk_layernorm:
        kept["queries and keys before their norm"] = query + key
    kept |= _mlps_per_token(args, is_moe=is_moe)
    for part in _dropped(config, is_moe=is_moe):
        kept.pop(part, None)
    return kept


def _mlps_per_token(args: Any, *, is_moe: bool) -> dict[str, float]:
    tp, hidden = args.tensor_model_parallel_size, args.hidden_size
    if not is_moe:
        first, second = _mlp_per_token(args, args.ffn_hidden_size / tp)
        return {"MLP, up": first, "MLP, activation": second}
    split = parameters.split_of(args)
    # Each token is sent to topk experts; the ranks that share one expert all see it.
    copies = args.moe_router_topk * split.etp / tp
    first, second = _mlp_per_token(args, args.moe_ffn_hidden_size / split.etp)
    kept = {
        "experts' inputs": copies * (args.moe_latent_size or hidden),
        "experts, up": copies * first,
        "experts, activation": copies * second,
        "router": 2.0 * args.num_experts / _stream_ranks(args),
    }
    shared = args.moe_shared_expert_intermediate_size
    if shared:
        first, second = _mlp_per_token(args, shared / tp)
        kept |= {"shared experts": first + second}
    return kept


def _mlp_per_token(args: Any, ffn: float) -> tuple[float, float]:
    if not args.swiglu:
        return ffn, ffn
    # The flags a CPU needs switch the fusion off; the estimate is of a GPU.
    is_fused = args.bias_swiglu_fusion or cpu.is_needed()
    return 2 * ffn, ffn if is_fused else 2 * ffn


_RECOMPUTED: Final = {
    "layernorm": ("inputs of attention and MLP",),
    "mlp": ("MLP, up", "MLP, activation"),
    "moe_act": ("experts, activation",),
    "moe": ("experts' inputs", "experts, up", "experts, activation", "router", "shared experts"),
    "shared_experts": ("shared experts",),
    "mla_up_proj": ("queries, keys, values",),
}
"""What ``--recompute-modules`` drops. ``core_attn`` drops nothing: scores are not kept here."""


def _dropped(config: Any, *, is_moe: bool) -> Iterator[str]:
    if config.recompute_granularity == "selective":
        for module in config.recompute_modules or ():
            yield from _RECOMPUTED.get(module, ())


def _after_recomputation(
    args: Any, *, whole: float, stream: float, num_layers: int
) -> tuple[float, str]:
    """Return what all layers keep of one micro-batch, and in words what they recompute."""
    if args.recompute_granularity == "selective":
        modules = ", ".join(args.recompute_modules or ["core_attn"])
        return whole, f"without {modules}, which is recomputed"
    if args.recompute_granularity != "full":
        return whole, "nothing recomputed"
    step = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        recomputed = min(num_layers, step)
        rest = whole * (1 - recomputed / num_layers) if num_layers else 0.0
        return recomputed * stream + rest, f"{recomputed} layers recomputed"
    inputs = "the input of each layer" if step == 1 else f"the input of every {step} layers"
    return -(-num_layers // step) * stream, f"{inputs}, the rest recomputed"


def _stream_ranks(args: Any) -> int:
    return args.tensor_model_parallel_size if args.sequence_parallel else 1


def _attention_scores(args: Any, tokens: int) -> Iterator[Part]:
    if attention_backend(args) != "reference":
        return
    heads = args.num_attention_heads / args.tensor_model_parallel_size
    keys = tokens * args.context_parallel_size
    yield Part(
        "scores of reference attention",
        2 * 4 * heads * tokens * keys,
        f"{heads:g} heads x {tokens:,} x {keys:,} x 4 B, twice",
    )


def _logits(args: Any, tokens: int, element: int) -> Part:
    vocabulary = args.padded_vocab_size / args.tensor_model_parallel_size
    # In 16 bits: the logits, and their float32 copy, in which softmax and gradient are computed.
    size = 6 if element == 2 else 4
    heads = 1 + (args.mtp_num_layers or 0)
    again = f" x {heads} heads" if heads > 1 else ""
    return Part(
        "logits",
        size * tokens * vocabulary * heads,
        f"{tokens:,} tokens x {vocabulary:,.0f} ids x {size} B{again}",
    )


def text_of_bytes(num_bytes: float) -> str:
    """Return a size as people compare it with the memory of a GPU: 1 GB is 1e9 bytes.

    Example:
        >>> text_of_bytes(80e9), text_of_bytes(2.5e6)
        ('80.0 GB', '2.5 MB')
    """
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def available(subject: Subject) -> float | None:
    """Return the memory of the smallest GPU in bytes, or that which the doctor was told."""
    if subject.wishes.gpu_memory_gb is not None:
        return subject.wishes.gpu_memory_gb * 1e9
    return min((gpu.memory for gpu in subject.machine.gpus), default=None)


@rule("memory", Severity.WARNING, Stage.MODEL, theme="memory")
def too_little(subject: Subject) -> Iterator[Finding]:
    """A GPU has less memory than the run needs, by estimate."""
    found, there = estimate(subject.settled, subject.config.transformer), available(subject)
    if found is None or there is None or found.total <= FULL * there:
        return
    largest = max(found.parts[:-1], key=lambda part: part.num_bytes)  # but for the reserve
    yield Finding(
        f"the fullest GPU needs about {text_of_bytes(found.total)} of {text_of_bytes(there)} "
        f"(estimated), {text_of_bytes(largest.num_bytes)} of it {largest.name}: {largest.how}",
        "; ".join(_remedies(subject.settled, largest.name)),
        {"needed": found.total, "available": there},
    )


def _remedies(args: Any, largest: str) -> Iterator[str]:
    sharing = max(sharing_ranks(args)) > 1
    if largest == "optimizer" and not args.use_distributed_optimizer and sharing:
        yield "add --use-distributed-optimizer"
    if largest in ("weights", "gradients", "optimizer"):
        yield "raise --tensor-model-parallel-size or --pipeline-model-parallel-size" + (
            ", or --expert-model-parallel-size" if args.num_experts else ""
        )
    if largest == "activations" and args.recompute_granularity != "full":
        yield (
            "add --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    if largest in ("activations", "working layer", "logits") or "scores" in largest:
        yield "raise --context-parallel-size, or shorten --seq-length"
    if args.micro_batch_size > 1:
        yield "use --micro-batch-size 1"
