"""How rows, batches and the length of the run fit each other; and how many of the tokens count.

What an epoch will look like is the business of ``megasft plan``: its cautions are asked here, with
the run's own rows, and added to by what only the run knows, its length and its validation stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from megasft.checks import plan as forecast_cautions
from megasft.checks.run.finding import Hit
from megasft.packing.balance import BatchShape
from megasft.packing.forecast import Run, forecast
from megasft.training import row_order
from megasft.training.datasets import PlannedStore

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject

MANY_EPOCHS: Final = 10
SHORT_SHARE: Final = 512
"""Tokens of a row's share below which a GPU waits for launches and messages."""

_ASKED_ALREADY: Final = ("indivisible-batch", "too-long")


def summary(subject: Subject) -> Iterator[Hit]:
    """Say what an epoch holds."""
    args = subject.settled
    plan = subject.data.train.plan
    yield Hit(
        plan.summary(global_batch_size=args.global_batch_size),
        "",
        {"rows": plan.epoch_rows, "iterations": plan.epoch_rows / args.global_batch_size},
    )


def run_length(subject: Subject) -> Iterator[Hit]:
    """Say how many epochs the run is."""
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
        yield Hit(f"{length} is {epochs:.2f} epochs{missed}", "", {"epochs": epochs})


def many_epochs(subject: Subject) -> Iterator[Hit]:
    """Find runs that see the same samples over and over."""
    epochs = _epochs(subject)
    if epochs is not None and epochs > MANY_EPOCHS:
        yield Hit(
            f"the run is {epochs:,.1f} epochs, so the model sees each sample that often",
            "fine-tuning takes 1 to 5 as a rule; --megasft-epochs 3 says it in epochs",
            {"epochs": epochs},
        )


def _epochs(subject: Subject) -> float | None:
    args = subject.settled
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    rows = subject.data.train.plan.epoch_rows
    return samples / rows if samples and not args.skip_train else None


def too_long(subject: Subject) -> Iterator[Hit]:
    """Find samples that fit no row; a run says it, with the first of them, when it announces."""
    for name, planned in _planned(subject):
        lost = planned.plan.too_long
        if len(lost):
            lengths = planned.store.tokens.lengths[lost]
            yield Hit(
                f"{name}: {len(lost):,} of {len(planned.store):,} samples are longer than "
                f"--seq-length {planned.plan.row_tokens:,} and are left out: "
                f"{int(lengths.sum()):,} tokens, the longest has {int(lengths.max()):,}",
                "raise --seq-length, or build with --max-tokens to shorten them",
                {"samples": len(lost), "tokens": int(lengths.sum())},
            )


def cautions(subject: Subject) -> Iterator[Hit]:
    """Ask what ``megasft plan`` cautions about, of the rows that train.

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
        if caution.name == "pipeline-bubble" and is_interleaved:
            continue  # it knows no virtual stages
        if caution.name not in _ASKED_ALREADY:
            # The command's flag has no prefix.
            remedy = caution.remedy.replace("--packer", "--megasft-packer")
            yield Hit(caution.fact, remedy, {"caution": caution.name})


def row_of_one(subject: Subject) -> Iterator[Hit]:
    """Find rows so short that context parallelism leaves them no second document."""
    args = subject.args
    cp, row = args.context_parallel_size, args.seq_length
    if cp > 1 and row and row < 4 * cp:
        yield Hit(
            f"a row of {row} tokens holds one document at most: --context-parallel-size {cp} pads "
            f"each to a multiple of {2 * cp}",
            "lengthen --seq-length to thousands of tokens a rank, or drop context parallelism, "
            "which is for rows that do not fit one GPU",
            {"row_tokens": row, "align_tokens": 2 * cp},
        )


def short_shares(subject: Subject) -> Iterator[Hit]:
    """Find rows that context parallelism cuts into crumbs."""
    args = subject.args
    cp = args.context_parallel_size
    if cp > 1 and args.seq_length / cp < SHORT_SHARE and subject.machine.gpus:
        yield Hit(
            f"--context-parallel-size {cp} leaves each rank {args.seq_length // cp} tokens of a "
            f"row of {args.seq_length:,}: messages take longer than the computation",
            "use fewer context-parallel ranks, or longer rows",
            {"tokens": args.seq_length // cp},
        )


def whole_rows_together(subject: Subject) -> Iterator[Hit]:
    """Find micro-batches of several long rows, which longer rows do better."""
    args = subject.args
    if (args.micro_batch_size or 1) > 1 and args.seq_length >= 8192:
        yield Hit(
            f"--micro-batch-size {args.micro_batch_size} lays rows of {args.seq_length:,} tokens "
            "end to end: the memory of a row as many times long, and the padding of short ones",
            "use --micro-batch-size 1 and a longer --seq-length if there is memory",
            {"tokens": args.micro_batch_size * args.seq_length},
        )


def _planned(subject: Subject) -> Iterator[tuple[str, PlannedStore]]:
    yield "train", subject.data.train
    for name, planned in subject.data.valid.items():
        yield f"validation {name}", planned
