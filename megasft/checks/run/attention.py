"""What the chosen attention does not compute, or computes slowly or in much memory.

The table of limits is ``megasft/attention/README.md``. What a backend refuses is asked of the
backend itself: a core attention has no weights, so one is made from the run's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from megasft.checks.run import parameters
from megasft.checks.run.finding import Hit
from megasft.errors import FlagError
from megasft.megatron.flags import attention_backend

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject

GIB: Final = 2**30
LONG_FOR_REFERENCE: Final = 8192
WIDEST_FAST_HEAD: Final = 256


def refused(subject: Subject) -> Iterator[Hit]:
    """Find model options that our attention does not compute."""
    from megasft.megatron.core_attention import PackedCoreAttention

    backend, config = attention_backend(subject.settled), subject.config.transformer
    if backend is None:
        return
    kinds = config.cp_comm_type
    for kind in dict.fromkeys(kinds if isinstance(kinds, list) else [kinds]):
        try:
            PackedCoreAttention(
                *(config, 1, None, "self"),
                cp_comm_type=kind,
                pg_collection=SimpleNamespace(cp=None),
                backend=backend,
            )
        except FlagError as error:
            yield Hit.from_message(str(error))


def heads_to_exchange(subject: Subject) -> Iterator[Hit]:
    """Find heads that Transformer Engine's all-to-all context parallelism cannot deal out."""
    args = subject.args
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    if cp == 1 or attention_backend(args) is not None or not args.num_attention_heads:
        return
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if "a2a" in args.cp_comm_type and (groups // tp) % cp:
        yield Hit(
            f"--cp-comm-type a2a deals the {max(groups // tp, 1)} key heads of a rank to "
            f"{cp} context-parallel ranks, which does not come out even",
            "use --cp-comm-type p2p, or a CP that divides them",
            {"heads": groups // tp, "cp": cp},
        )


def slow_kernel(subject: Subject) -> Iterator[Hit]:
    """Find runs on a GPU whose blocks only the slow kernel computes."""
    args = subject.settled
    if attention_backend(args) not in ("ring", "all_gather") or not subject.machine.gpus:
        return
    query = parameters.attention_sizes(args)[0] // args.num_attention_heads
    reasons = {
        "float32 (add --bf16)": not (args.bf16 or args.fp16),
        f"heads of {query}": query > WIDEST_FAST_HEAD,
        "a sliding window under context parallelism": bool(args.window_size)
        and args.context_parallel_size > 1,
        "a GPU before compute capability 8.0": any(
            gpu.capability < (8, 0) for gpu in subject.machine.gpus
        ),
    }
    given = [reason for reason, is_so in reasons.items() if is_so]
    if given:
        yield Hit(
            f"attention takes the tiled kernel, exact and slow, because of {' and '.join(given)}",
            "use --transformer-impl transformer_engine --megasft-attention te, or lift the reason",
        )


def quadratic_memory(subject: Subject) -> Iterator[Hit]:
    """Find attention that keeps a square of a long row."""
    args = subject.settled
    backend, row = attention_backend(args), args.micro_batch_size * args.seq_length
    if backend == "reference" and row > LONG_FOR_REFERENCE:
        yield Hit(
            f"--megasft-attention reference keeps {row:,} x {row:,} scores a head",
            "use ring; reference is to debug with",
        )
    mask = row // (2 * args.context_parallel_size) * row
    if backend == "sdpa" and args.context_parallel_size > 1 and mask > GIB:
        yield Hit(
            f"--megasft-attention sdpa under CP {args.context_parallel_size} makes a mask of "
            f"{mask / GIB:.1f} GiB for each slice of a row of {row:,} tokens",
            "use ring or all_gather",
        )
