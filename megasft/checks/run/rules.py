"""All rules of preflight by name: what each finds, how bad that is, and what it needs to be known.

A rule is one small function over the run (``subject.py``), or a step of the start, whose refusal it
names. Its order here is that of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from megasft.checks.run import (
    attention,
    checkpoints,
    flags,
    limits,
    machine,
    memory,
    moe,
    parallel,
    rows,
    speed,
    stores,
)
from megasft.checks.run.finding import Hit
from megasft.checks.run.subject import Subject
from megasft.severity import Severity


class Stage(StrEnum):
    """What is known when a rule runs; stages follow each other in this order.

    ``OPEN``, ``LENGTH`` and ``SETTLE`` hold steps, which make the next stage possible.
    """

    MACHINE = "machine"
    FLAGS = "flags"
    OPEN = "open"
    DATA = "data"
    LENGTH = "length"
    SETTLE = "settle"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong, or that is worth knowing.

    Attributes:
        severity: How bad it is.
        stage: What has to be known to ask.
        theme: What it is about.
        meaning: What it finds, in a sentence.
        check: Yields a hit each time it fires; None for a step of the start (``run/start.py``),
            which is an error where it refuses.
        announced: A run says it by itself as it starts, so it is the doctor's.
    """

    severity: Severity
    stage: Stage
    theme: str
    meaning: str
    check: Callable[[Subject], Iterable[Hit]] | None = None
    announced: bool = False


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
_ON_MACHINE, _ON_FLAGS, _ON_DATA = Stage.MACHINE, Stage.FLAGS, Stage.DATA
_ON_MODEL = Stage.MODEL

RULES: Final[dict[str, Rule]] = {
    "versions": Rule(
        _N, _ON_MACHINE, "machine", "versions of everything that takes part", machine.versions
    ),
    "devices": Rule(
        _N, _ON_MACHINE, "machine", "the GPUs, or that there are none", machine.devices
    ),
    "megatron-version": Rule(
        _E, _ON_MACHINE, "machine", "megatron-core is missing, too old or too new",
        machine.wrong_megatron,
    ),
    "megatron-untested": Rule(
        _N, _ON_MACHINE, "machine", "another megatron-core than the tested one",
        machine.untested_megatron,
    ),
    "packages": Rule(
        _W, _ON_MACHINE, "machine", "an optional package that a GPU run lacks, and what that costs",
        machine.packages,
    ),
    "slow-environment": Rule(
        _W, _ON_MACHINE, "machine", "environment variables that debug, or switch a transport off",
        machine.slow_environment,
    ),
    "shared-memory": Rule(
        _W, _ON_MACHINE, "machine", "/dev/shm is too small for NCCL and data loading",
        machine.small_shared_memory,
    ),
    "open-files": Rule(
        _N, _ON_MACHINE, "machine", "few files may be open at once", machine.few_open_files
    ),
    "locked-memory": Rule(
        _W, _ON_MACHINE, "machine", "InfiniBand may not lock its buffers", machine.locked_memory
    ),
    "cuda-connections": Rule(
        _E, _ON_FLAGS, "machine", "CUDA_DEVICE_MAX_CONNECTIONS is not what Megatron asserts",
        machine.cuda_connections,
    ),
    "too-many-ranks": Rule(
        _E, _ON_FLAGS, "machine", "more ranks than GPUs on this machine", machine.too_many_ranks
    ),
    "precision": Rule(
        _W, _ON_FLAGS, "machine", "a precision this GPU lacks, or none chosen",
        machine.half_precision,
    ),
    "missing-flag": Rule(
        _E, _ON_FLAGS, "flags", "a flag is missing that Megatron cannot do without", flags.missing
    ),
    "refused-flag": Rule(
        _E, _ON_FLAGS, "flags", "flags that would change what the loss means, or have no effect"
    ),
    "contradicting-flags": Rule(
        _E, _ON_FLAGS, "flags", "two flags exclude each other", flags.contradicting
    ),
    "size-not-positive": Rule(_E, _ON_FLAGS, "flags", "a size below 1", parallel.not_positive),
    "dropout": Rule(_W, _ON_FLAGS, "flags", "dropout is on", flags.dropout),
    "loss-scale": Rule(
        _W, _ON_FLAGS, "flags", "loss scaling without fp16, or fp16 with a large start",
        flags.loss_scale,
    ),
    "no-clipping": Rule(_W, _ON_FLAGS, "flags", "gradients are not clipped", flags.no_clipping),
    "random-weights": Rule(
        _W, _ON_FLAGS, "flags", "training starts from random weights", flags.random_weights
    ),
    "world-size": Rule(
        _E, _ON_FLAGS, "layout", "TP x PP x CP does not divide the ranks", parallel.world_size
    ),
    "expert-world-size": Rule(
        _E, _ON_FLAGS, "layout", "EP x ETP x PP does not divide the ranks",
        parallel.expert_world_size,
    ),
    "experts": Rule(
        _E, _ON_FLAGS, "layout", "EP does not divide the experts, or there are none",
        parallel.experts,
    ),
    "heads": Rule(
        _E, _ON_FLAGS, "layout", "TP does not divide attention heads or query groups",
        parallel.heads,
    ),
    "head-groups": Rule(
        _E, _ON_FLAGS, "layout", "heads, query groups and hidden size do not divide",
        parallel.head_groups,
    ),
    "widths": Rule(
        _E, _ON_FLAGS, "layout", "TP or ETP does not divide a width", parallel.widths
    ),
    "layers": Rule(
        _E, _ON_FLAGS, "layout", "pipeline stages, or virtual ones, do not divide the layers",
        parallel.layers,
    ),
    "global-batch": Rule(
        _E, _ON_FLAGS, "layout", "ranks cannot share a global batch in whole micro-batches",
        parallel.global_batch,
    ),
    "moe-sequence-parallel": Rule(
        _E, _ON_FLAGS, "layout", "experts under TP without --sequence-parallel",
        moe.needs_sequence_parallel,
    ),
    "no-sequence-parallel": Rule(
        _N, _ON_FLAGS, "layout", "TP without --sequence-parallel", parallel.no_sequence_parallel
    ),
    "moe-dispatcher": Rule(
        _W, _ON_FLAGS, "layout", "experts' tokens are sent to every rank", moe.gathers_everything
    ),
    "moe-router-precision": Rule(
        _W, _ON_FLAGS, "model", "the router computes in 16 bits", moe.half_precision_router
    ),
    "moe-unbalanced": Rule(
        _N, _ON_FLAGS, "model", "nothing keeps experts evenly used", moe.no_balancing
    ),
    "row-over-positions": Rule(
        _E, _ON_FLAGS, "model", "rows are longer than --max-position-embeddings",
        limits.row_over_positions,
    ),
    "row-of-one": Rule(
        _E, _ON_FLAGS, "layout", "context parallelism leaves a row no second document",
        rows.row_of_one,
    ),
    "heads-to-exchange": Rule(
        _E, _ON_FLAGS, "model", "all-to-all context parallelism cannot deal out the heads",
        attention.heads_to_exchange,
    ),
    "store": Rule(
        _E, _ON_FLAGS, "data", "a store is missing, half-written, damaged or of another version",
        stores.unreadable,
    ),
    "rows": Rule(_E, Stage.OPEN, "data", "rows cannot be made of the stores"),
    "tokenizer": Rule(
        _E, _ON_DATA, "data", "a store was made with another tokenizer than the model's",
        stores.other_tokenizer,
    ),
    "tokenizer-moved": Rule(
        _W, _ON_DATA, "data", "a store's tokenizer file differs and cannot be compared",
        stores.uncomparable_tokenizer,
    ),
    "tokenizer-unknown": Rule(
        _N, _ON_DATA, "data", "a tokenizer is not known", stores.unknown_tokenizer
    ),
    "validation-tokenizer": Rule(
        _E, _ON_DATA, "data", "a validation store was made with another tokenizer",
        stores.unlike_validation,
    ),
    "validation-template": Rule(
        _W, _ON_DATA, "data", "a validation store was rendered with another chat template",
        stores.unlike_template,
    ),
    "validation-trained": Rule(
        _W, _ON_DATA, "data", "a validation store is trained on", stores.same_data
    ),
    "stop-token": Rule(
        _W, _ON_DATA, "data", "turns end where the model's generation does not stop",
        stores.other_stop,
    ),
    "document-over-positions": Rule(
        _W, _ON_DATA, "data", "documents are longer than the model was made for",
        limits.document_over_positions,
    ),
    "too-long": Rule(
        _W, _ON_DATA, "data", "samples fit no row and are left out", rows.too_long, announced=True
    ),
    "short-shares": Rule(
        _W, _ON_DATA, "data", "context parallelism cuts rows into crumbs", rows.short_shares
    ),
    "long-micro-batch": Rule(
        _N, _ON_DATA, "data", "several long rows make a micro-batch", rows.whole_rows_together
    ),
    "length": Rule(
        _E, Stage.LENGTH, "flags", "lengths in epochs, or windows of global batches, have no size"
    ),
    "complete": Rule(
        _N, Stage.LENGTH, "checkpoints", "the run has ended already, and nothing is left to do"
    ),
    "resume": Rule(
        _E, Stage.SETTLE, "checkpoints", "the run cannot resume from what --load holds"
    ),
    "megatron-refuses": Rule(
        _E, Stage.SETTLE, "flags", "Megatron's own validation refuses the flags"
    ),
    "epoch": Rule(_N, _ON_MODEL, "data", "what an epoch holds", rows.summary),
    "plan": Rule(
        _W, _ON_MODEL, "data", "what `megasft plan` cautions about: batches, padding, even ranks",
        rows.cautions,
    ),
    "run-length": Rule(_N, _ON_MODEL, "data", "how many epochs the run is", rows.run_length),
    "many-epochs": Rule(
        _W, _ON_MODEL, "data", "the run is many epochs", rows.many_epochs
    ),
    "units-int32": Rule(
        _E, _ON_MODEL, "model", "units of a global batch do not fit 32 bits", limits.too_many_units
    ),
    "logits-int32": Rule(
        _W, _ON_MODEL, "model", "logits of a micro-batch do not fit 32-bit offsets",
        limits.too_many_logits,
    ),
    "attention-refuses": Rule(
        _E, _ON_MODEL, "model", "the chosen attention does not compute what the model asks",
        attention.refused,
    ),
    "attention-kernel": Rule(
        _W, _ON_MODEL, "model", "attention takes its slow kernel", attention.slow_kernel
    ),
    "attention-memory": Rule(
        _W, _ON_MODEL, "model", "the chosen attention keeps a square of the row",
        attention.quadratic_memory,
    ),
    "memory": Rule(
        _W, _ON_MODEL, "memory", "a GPU has less memory than the run needs, by estimate",
        memory.too_little,
    ),
    "not-saved": Rule(
        _W, _ON_FLAGS, "checkpoints", "the run leaves no checkpoint", checkpoints.not_saved
    ),
    "save-not-writable": Rule(
        _E, _ON_FLAGS, "checkpoints", "--save cannot be written to", checkpoints.not_writable
    ),
    "disk-full": Rule(
        _E, _ON_MODEL, "checkpoints", "not even one checkpoint has room", checkpoints.disk_full
    ),
    "disk-filling": Rule(
        _W, _ON_MODEL, "checkpoints", "the disk fills up during the run", checkpoints.disk_filling
    ),
    "checkpoint-size": Rule(
        _N, _ON_MODEL, "checkpoints", "how large checkpoints are", checkpoints.checkpoint_size
    ),
    "duration": Rule(
        _N, _ON_MODEL, "speed", "what an epoch computes, and its hours", speed.duration
    ),
}  # fmt: skip
