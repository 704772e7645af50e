"""What the chosen attention does not compute, or computes slowly or in much memory.

The table of limits is ``megasft/attention/README.md``. What a backend refuses is asked of the
backend itself: a core attention has no weights, so one is made from the run's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Final

from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run import parameters
from megasft.checks.run.subject import Stage, Subject
from megasft.errors import FlagError
from megasft.megatron.flags import attention_backend

GIB: Final = 2**30
LONG_FOR_REFERENCE: Final = 8192
WIDEST_FAST_HEAD: Final = 256


@rule("attention-refuses", Severity.ERROR, Stage.MODEL, theme="model")
def refused(subject: Subject) -> Iterator[Finding]:
    """The chosen attention does not compute what the model asks."""
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
            yield Finding(str(error))


@rule("attention-kernel", Severity.WARNING, Stage.MODEL, theme="model")
def slow_kernel(subject: Subject) -> Iterator[Finding]:
    """Attention takes its slow kernel."""
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
        yield Finding(
            f"attention takes the tiled kernel, exact and slow, because of {' and '.join(given)}",
            "use --transformer-impl transformer_engine --megasft-attention te, or lift the reason",
        )


@rule("attention-memory", Severity.WARNING, Stage.MODEL, theme="model")
def quadratic_memory(subject: Subject) -> Iterator[Finding]:
    """The chosen attention keeps a square of the row."""
    args = subject.settled
    backend, row = attention_backend(args), args.micro_batch_size * args.seq_length
    if backend == "reference" and row > LONG_FOR_REFERENCE:
        yield Finding(
            f"--megasft-attention reference keeps {row:,} x {row:,} scores a head",
            "use ring; reference is to debug with",
        )
    mask = row // (2 * args.context_parallel_size) * row
    if backend == "sdpa" and args.context_parallel_size > 1 and mask > GIB:
        yield Finding(
            f"--megasft-attention sdpa under CP {args.context_parallel_size} makes a mask of "
            f"{mask / GIB:.1f} GiB for each slice of a row of {row:,} tokens",
            "use ring or all_gather",
        )
