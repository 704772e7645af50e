"""How rows, batches and the length of the run fit each other; and how many of the tokens count.

What an epoch will look like is the business of ``megasft plan``: its cautions are asked here, with
the run's own rows, and added to by what only the run knows, its length and its validation stores.
Megatron adds units up in int32, and kernels that index logits with 32-bit offsets read elsewhere
without a word once a micro-batch has 2**31 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megasft.checks import plan as forecast_cautions
from megasft.checks.engine import Finding, Severity, rule, step
from megasft.checks.run.subject import Stage, Subject
from megasft.packing.balance import BatchShape
from megasft.packing.forecast import Run, forecast
from megasft.training import row_order
from megasft.training.datasets import PlannedStore

INT32: Final = 2**31
MANY_EPOCHS: Final = 10
SHORT_SHARE: Final = 512
"""Tokens of a row's share below which a GPU waits for launches and messages."""

_ASKED_ALREADY: Final = ("indivisible-batch", "too-long")


@rule("too-long", Severity.WARNING, Stage.DATA, theme="data", announced=True)
def too_long(subject: Subject) -> Iterator[Finding]:
    """Samples fit no row and are left out.

    A run says it, with the first of them, when it announces its data.
    """
    for name, planned in _planned(subject):
        lost = planned.plan.too_long
        if len(lost):
            lengths = planned.store.tokens.lengths[lost]
            yield Finding(
                f"{name}: {len(lost):,} of {len(planned.store):,} samples are longer than "
                f"--seq-length {planned.plan.row_tokens:,} and are left out: "
                f"{int(lengths.sum()):,} tokens, the longest has {int(lengths.max()):,}",
                "raise --seq-length, or build with --max-tokens to shorten them",
                {"samples": len(lost), "tokens": int(lengths.sum())},
            )


@rule("short-shares", Severity.WARNING, Stage.DATA, theme="data")
def short_shares(subject: Subject) -> Iterator[Finding]:
    """Context parallelism cuts rows into crumbs."""
    args = subject.args
    cp = args.context_parallel_size
    if cp > 1 and args.seq_length / cp < SHORT_SHARE and subject.machine.gpus:
        yield Finding(
            f"--context-parallel-size {cp} leaves each rank {args.seq_length // cp} tokens of a "
            f"row of {args.seq_length:,}: messages take longer than the computation",
            "use fewer context-parallel ranks, or longer rows",
            {"tokens": args.seq_length // cp},
        )


@rule("long-micro-batch", Severity.NOTE, Stage.DATA, theme="data")
def whole_rows_together(subject: Subject) -> Iterator[Finding]:
    """Several long rows make a micro-batch."""
    args = subject.args
    if (args.micro_batch_size or 1) > 1 and args.seq_length >= 8192:
        yield Finding(
            f"--micro-batch-size {args.micro_batch_size} lays rows of {args.seq_length:,} tokens "
            "end to end: the memory of a row as many times long, and the padding of short ones",
            "use --micro-batch-size 1 and a longer --seq-length if there is memory",
            {"tokens": args.micro_batch_size * args.seq_length},
        )


LENGTH = step(
    "length",
    Stage.LENGTH,
    theme="flags",
    meaning="lengths in epochs, or windows of global batches, have no size",
)
COMPLETE = step(
    "complete",
    Stage.LENGTH,
    theme="checkpoints",
    meaning="the run has ended already, and nothing is left to do",
    severity=Severity.NOTE,
)
RESUME = step(
    "resume",
    Stage.SETTLE,
    theme="checkpoints",
    meaning="the run cannot resume from what --load holds",
)
MEGATRON_REFUSES = step(
    "megatron-refuses",
    Stage.SETTLE,
    theme="flags",
    meaning="Megatron's own validation refuses the flags",
)


@rule("epoch", Severity.NOTE, Stage.MODEL, theme="data")
def summary(subject: Subject) -> Iterator[Finding]:
    """What an epoch holds."""
    args = subject.settled
    plan = subject.data.train.plan
    yield Finding(
        plan.summary(global_batch_size=args.global_batch_size),
        "",
        {"rows": plan.epoch_rows, "iterations": plan.epoch_rows / args.global_batch_size},
    )


@rule("plan", Severity.WARNING, Stage.MODEL, theme="data")
def cautions(subject: Subject) -> Iterator[Finding]:
    """What `megasft plan` cautions about: batches, padding, even ranks.

    The forecast looks at each step of an epoch, and tells no rank what it does not tell rank 0.
    """
    args = subject.settled
    if args.rank:
        return
    shape = BatchShape(args.global_batch_size, args.data_parallel_size, args.micro_batch_size)
    run = Run(
        shape,
        seed=args.seed,
        cp_size=args.context_parallel_size,
        tp_size=args.tensor_model_parallel_size,
        pp_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        packer=args.megasft_packer,
        window=row_order.cost_window(args),
    )
    data = subject.data.train
    seen = forecast(data.store, data.plan, run, row_order.cost_of(args))
    for caution in forecast_cautions.cautions(seen):
        is_interleaved = args.virtual_pipeline_model_parallel_size is not None
        if caution.rule == "pipeline-bubble" and is_interleaved:
            continue  # it knows no virtual stages
        if caution.rule not in _ASKED_ALREADY:
            # The command's flag has no prefix.
            remedy = caution.remedy.replace("--packer", "--megasft-packer")
            yield Finding(caution.fact, remedy, {"caution": caution.rule})


@rule("run-length", Severity.NOTE, Stage.MODEL, theme="data")
def run_length(subject: Subject) -> Iterator[Finding]:
    """How many epochs the run is."""
    epochs = _epochs(subject)
    if epochs is not None:
        args = subject.settled
        length = (
            f"--train-iters {args.train_iters:,}"
            if args.train_iters
            else f"--train-samples {args.train_samples:,}"
        )
        missed = (
            f", {100 * (1 - epochs):.0f} % of the rows are not trained" if epochs < 0.99 else ""
        )
        yield Finding(f"{length} is {epochs:.2f} epochs{missed}", "", {"epochs": epochs})


@rule("many-epochs", Severity.WARNING, Stage.MODEL, theme="data")
def many_epochs(subject: Subject) -> Iterator[Finding]:
    """The run is many epochs."""
    epochs = _epochs(subject)
    if epochs is not None and epochs > MANY_EPOCHS:
        yield Finding(
            f"the run is {epochs:,.1f} epochs, so the model sees each sample that often",
            "fine-tuning takes 1 to 5 as a rule; --megasft-epochs 3 says it in epochs",
            {"epochs": epochs},
        )


@rule("units-int32", Severity.ERROR, Stage.MODEL, theme="model")
def too_many_units(subject: Subject) -> Iterator[Finding]:
    """Units of a global batch do not fit 32 bits."""
    args, plan = subject.settled, subject.data.train.plan
    per_row = {"turn": plan.turns, "sample": plan.labelled_samples, "token": plan.labels}
    most = int(per_row[args.megasft_loss].max(initial=0)) * int(args.global_batch_size)
    if most >= INT32:
        yield Finding(
            f"a global batch of {args.global_batch_size} rows may hold {most:,} {args.megasft_loss}"
            f" units, and Megatron counts them in 32 bits (up to {INT32 - 1:,})",
            "lower --global-batch-size",
            {"units": most},
        )


@rule("logits-int32", Severity.WARNING, Stage.MODEL, theme="model")
def too_many_logits(subject: Subject) -> Iterator[Finding]:
    """Logits of a micro-batch do not fit 32-bit offsets."""
    args = subject.settled
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    num = tokens * args.padded_vocab_size // args.tensor_model_parallel_size
    if num >= INT32:
        yield Finding(
            f"a micro-batch has {num:,} logits on a GPU ({tokens:,} tokens x "
            f"{args.padded_vocab_size:,} ids / TP {args.tensor_model_parallel_size}), more than "
            f"the {INT32:,} that kernels with 32-bit offsets reach",
            "raise --context-parallel-size or --tensor-model-parallel-size, or lower "
            "--micro-batch-size",
            {"logits": num},
        )


def _epochs(subject: Subject) -> float | None:
    args = subject.settled
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    rows = subject.data.train.plan.epoch_rows
    return samples / rows if samples and not args.skip_train else None


def _planned(subject: Subject) -> Iterator[tuple[str, PlannedStore]]:
    yield "train", subject.data.train
    for name, planned in subject.data.valid.items():
        yield f"validation {name}", planned
