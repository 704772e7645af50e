"""Where the run of a checkpoint is, what it trains next, and what is another flag than it was.

The order of rows and the position in it, Megatron's consumed samples, say which rows come next, on
any layout; a run on other rows is refused before (``training/resume.py``). To replay Megatron's
sampler for each rank was rejected: it shows the same rows, and tests/megatron compares them with
what ranks really train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from megasft.checks.engine import Finding, Severity, rule, step
from megasft.checks.run.subject import Stage, Subject
from megasft.errors import MegasftError
from megasft.megatron.checkpoint import is_resharded, loads_optimizer
from megasft.packing.plan import RowPlan
from megasft.training import arguments

SAMPLES_SHOWN: Final = 4
"""Samples shown of each row."""
ROWS_SHOWN: Final = 16

_NOT_COMPARED: Final = frozenset(
    {"load", "ckpt_step", "finetune", "rank", "local_rank", "world_size", "megasft_flags"}
)
"""Values that say how a run was started, not what it is."""


REFUSED = step(
    "resume-refused",
    Stage.SETTLE,
    theme="resume",
    meaning="Megatron refuses the checkpoint, its schedule or its next global batch",
)


@rule("resume-next", Severity.NOTE, Stage.MODEL, theme="resume")
def summary(subject: Subject) -> Iterator[Finding]:
    """Where a checkpoint's run is, what changes and what comes next."""
    state, next_step = subject.saved, subject.next_step
    if state is None or next_step is None:
        return
    plan, consumed = subject.data.train.plan, int(state["args"].consumed_train_samples)
    iteration = int(state["iteration"])
    yield Finding(
        f"{subject.args.load}: iteration {iteration:,}, {consumed:,} rows consumed, "
        f"{_place(plan, consumed)}"
    )
    yield Finding(
        f"the next step has learning rate {next_step.learning_rate:.6g}; "
        f"{next_step.steps_to_come:,} steps to come"
    )
    if subject.schedule is not None:
        yield Finding(subject.schedule)
    yield from _changes(subject, state["args"])
    order = plan.order(seed=subject.settled.seed, window=subject.window)
    rows = [order[k] for k in range(consumed, consumed + next_step.num_rows)]
    numbers = next_step._asdict() | {"iteration": iteration, "consumed": consumed, "rows": rows}
    more = f" and {len(rows) - ROWS_SHOWN:,} more" if len(rows) > ROWS_SHOWN else ""
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    yield Finding(
        f"iteration {iteration + 1:,} trains {len(rows):,} rows: {shown}{more}", numbers=numbers
    )
    yield from (_samples(subject, row) for row in rows[: subject.wishes.show_rows])


def _place(plan: RowPlan, position: int) -> str:
    """Say in which epoch a position is, and where in it; packings have epochs of their own."""
    turn, place = divmod(position, len(plan))
    starts = plan.stages[:: (len(plan.stages) - 1) // plan.num_packings]
    packing = int(np.searchsorted(starts, place, side="right")) - 1
    in_epoch, num_rows = place - starts[packing], starts[packing + 1] - starts[packing]
    where = f"{in_epoch:,} of its {num_rows:,} rows" if in_epoch else "at its start"
    return f"epoch {turn * plan.num_packings + packing + 1:,}, {where}"


def _samples(subject: Subject, row: int) -> Finding:
    plan, store = subject.data.train.plan, subject.data.train.store
    samples = plan.rows[row].tolist()
    more = f" and {len(samples) - SAMPLES_SHOWN:,} more" if len(samples) > SAMPLES_SHOWN else ""
    shown = ", ".join(
        f"{store.source_line(i)} (sample {i}, {int(store.tokens.lengths[i]):,} tokens)"
        for i in samples[:SAMPLES_SHOWN]
    )
    return Finding(
        f"row {row:,} has {len(samples):,} samples, {int(plan.labels[row]):,} labels, "
        f"{int(plan.tokens[row]):,} of {plan.row_tokens:,} tokens: {shown}{more}"
    )


def _changes(subject: Subject, saved: Any) -> Iterator[Finding]:
    """Say which sizes of the layout, and which flags as they were given, are not what they were."""
    pairs = [
        (title, getattr(saved, name), getattr(subject.settled, name))
        for title, name in (("ranks", "world_size"), ("data parallelism", "data_parallel_size"))
    ]
    try:
        before, now = (vars(arguments.parse(of.megasft_flags)) for of in (saved, subject.args))
    except (AttributeError, MegasftError) as error:  # an older checkpoint, or a model that is gone
        yield Finding(f"flags are not compared with those of the checkpoint: {error}")
    else:
        names = sorted(now.keys() - _NOT_COMPARED)
        pairs += [(f"--{name.replace('_', '-')}", before[name], now[name]) for name in names]
    for name, value, value_now in pairs:
        if value != value_now:
            yield Finding(f"{name}: {value} in the checkpoint, {value_now} now")


@rule("resume-differs", Severity.WARNING, Stage.MODEL, theme="resume")
def cautions(subject: Subject) -> Iterator[Finding]:
    """What is lost or means something else when the run resumes."""
    state, next_step = subject.saved, subject.next_step
    if state is None or next_step is None:
        return
    saved, args = state["args"], subject.settled
    end = saved.consumed_train_samples + next_step.steps_to_come * next_step.num_rows
    if not next_step.steps_to_come:
        yield Finding(
            f"the run ends before its next step: {state['iteration']:,} steps are done",
            "raise its length (--train-iters, --train-samples or --megasft-epochs)",
        )
    elif (
        args.train_samples is not None
        and not args.step_batch_size_schedule
        and abs(end - args.train_samples) >= next_step.num_rows
    ):
        yield Finding(
            f"Megatron divides --train-samples {args.train_samples:,} by the new batch size to "
            f"know its last step, so the run ends at row {end:,}",
            "set --train-samples accordingly",
        )
    if not loads_optimizer(args, state):
        yield Finding(
            "the optimizer is not loaded: its moments and the learning-rate schedule start again"
        )
    elif args.use_distributed_optimizer and not saved.use_distributed_optimizer:
        yield Finding(
            "--use-distributed-optimizer is new, and Megatron keeps moments in another form "
            "with it",
            "if loading fails, --no-load-optim starts them again",
        )
    if max(args.attention_dropout, args.hidden_dropout) > 0 and is_resharded(args, state):
        yield Finding("with another TP or PP Megatron draws other dropout: losses are not the same")
    if args.num_experts and args.micro_batch_size != saved.micro_batch_size:
        yield Finding(
            "--micro-batch-size is not what it was, and a router's balancing loss is one of a "
            "micro-batch"
        )
    if getattr(saved, "skipped_train_samples", 0):
        yield Finding(
            f"{saved.skipped_train_samples:,} of the rows before were skipped by "
            "--iterations-to-skip"
        )
