"""What will cost a run time or samples, said before it starts: fact, numbers and remedy.

A rule looks at a ``Forecast``. Its limits are chosen so that a run with nothing to change finds
none. One of them is an error: what Megatron refuses at its start.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from megasft.checks.engine import Finding, Severity, ask, in_order, rule, rules_of
from megasft.cp_layout import alignment
from megasft.packing.balanced import lower_bound
from megasft.packing.forecast import Forecast
from megasft.packing.pack import KEEP_ORDER

SINGLE_ROWS: Final = 0.05
"""Share of rows of one sample from which on it is told."""
ALIGNMENT_WASTE: Final = 0.03
"""Share of all tokens that is padding inside documents from which on it is told."""
GAPS: Final = 0.05
"""Share of all tokens behind the last document of rows from which on it is told."""
FEW_ITERATIONS: Final = 10
"""Iterations below which an epoch is called short."""
FEW_TURNS: Final = 10
"""Turns of a step below which each is called heavy."""
HEAVY_TURN: Final = 0.1
"""Share of a step's labels from which on one turn is called heavy."""
STAGE_ROWS: Final = 0.01
"""Share of rows that stages may add."""
ROOMY: Final = 4
"""Times the longest sample from which on a row is called long, where there are few rows."""
UNEVEN: Final = 1.05
"""Slowest rank over the mean from which on it is told."""
BUBBLE: Final = 0.2
"""Share of a step in which a pipeline stage waits, from which on it is told."""


_MORE_ITERATIONS: Final = "a smaller --global-batch-size, a shorter --seq-length, or more data"


def cautions(seen: Forecast) -> tuple[Finding, ...]:
    """Return everything that a run should know before it starts, errors first."""
    return in_order(found for each in RULES.values() for found in ask(each, seen))


@rule("indivisible-batch", Severity.ERROR)
def indivisible_batch(seen: Forecast) -> Iterator[Finding]:
    """A global batch that ranks and micro-batches do not divide."""
    size, dp_size, micro_batch_size = seen.run.shape
    per_pass = seen.run.pass_rows
    if size % per_pass == 0:
        return
    below = f"{size - size % per_pass} or " if size > per_pass else ""
    yield Finding(
        f"a global batch of {size:,} rows is not a multiple of {per_pass:,} = {dp_size} "
        f"data-parallel ranks x micro-batches of {micro_batch_size}; Megatron will not start",
        f"set --global-batch-size to {below}{-(-size // per_pass) * per_pass}",
    )


@rule("too-long", Severity.WARNING)
def too_long(seen: Forecast) -> Iterator[Finding]:
    """Samples that fit no row."""
    num, tokens, longest, _ = seen.too_long
    if not num:
        return
    share = tokens / (tokens + int(seen.plan.tokens.sum()) / seen.plan.num_packings)
    yield Finding(
        f"{num:,} samples are longer than a row of {seen.plan.row_tokens:,} tokens and are left "
        f"out: {tokens:,} tokens, {100 * share:.1f} % of all; the longest has {longest:,}",
        "raise --seq-length, or cut them between turns: megasft build --max-tokens "
        f"{seen.plan.row_tokens}",
    )


@rule("batch-over-epoch", Severity.WARNING)
def batch_over_epoch(seen: Forecast) -> Iterator[Finding]:
    """A global batch that is larger than the epoch."""
    size, rows = seen.run.shape.global_batch_size, seen.plan.epoch_rows
    if seen.iterations < 1:
        yield Finding(
            f"a global batch of {size:,} rows is {1 / seen.iterations:,.1f} epochs of {rows:,.0f} "
            "rows: each step trains samples more than once",
            _MORE_ITERATIONS,
        )


@rule("short-epoch", Severity.WARNING)
def short_epoch(seen: Forecast) -> Iterator[Finding]:
    """An epoch of a few steps."""
    if 1 <= seen.iterations < FEW_ITERATIONS:
        yield Finding(
            f"an epoch is {seen.iterations:,.2f} iterations: learning rate, evaluation and saving "
            "move in large steps",
            _MORE_ITERATIONS,
        )


@rule("roomy-rows", Severity.WARNING)
def roomy_rows(seen: Forecast) -> Iterator[Finding]:
    """Rows far longer than any sample where there are few of them."""
    longest, row_tokens = int(seen.lengths.max()), seen.plan.row_tokens
    if row_tokens < ROOMY * longest or seen.iterations >= FEW_ITERATIONS:
        return
    # Twice the longest sample, as a power of two: rows still take several samples.
    shorter = max(2 ** (2 * longest - 1).bit_length(), seen.plan.align_tokens)
    yield Finding(
        f"the longest sample has {longest:,} tokens, a row {row_tokens:,}: few, large rows that "
        "need more memory each and no sample needs",
        f"--seq-length {shorter} makes some {row_tokens // shorter:,} times as many rows",
    )


@rule("rows-without-labels", Severity.WARNING)
def rows_without_labels(seen: Forecast) -> Iterator[Finding]:
    """Rows in which nothing is trained."""
    empty = int((seen.plan.labels == 0).sum())
    if not empty:
        return
    steps = int((seen.steps.labels == 0).sum())
    learned = f", and {steps:,} steps train nothing at all" if steps else ""
    yield Finding(
        f"{empty:,} of {len(seen.plan):,} rows hold no label{learned}",
        "look at the masks with megasft lint STORE; samples without a turn are best left out",
    )


@rule("heavy-turns", Severity.WARNING)
def heavy_turns(seen: Forecast) -> Iterator[Finding]:
    """A step that one turn decides."""
    turns, labels = seen.steps.turns, seen.steps.labels
    fewest, step = int(turns.min()), int(turns.argmin()) + 1
    share = seen.longest_turn / max(1.0, float(labels.mean()))
    if fewest >= FEW_TURNS and share <= HEAVY_TURN:
        return
    facts = []
    if fewest < FEW_TURNS:
        facts.append(f"the fewest turns of a step are {fewest:,}, at step {step:,}")
    if share > HEAVY_TURN:
        facts.append(
            f"the longest turn has {seen.longest_turn:,} labels, a mean step {labels.mean():,.0f} "
            "(matters with --megasft-loss token)"
        )
    yield Finding(
        f"one turn decides much of a step: {'; '.join(facts)}",
        "a larger --global-batch-size averages over more turns",
    )


@rule("single-rows", Severity.WARNING)
def single_rows(seen: Forecast) -> Iterator[Finding]:
    """Rows that hold one sample only."""
    is_single = seen.samples_per_row == 1
    share = float(is_single.mean())
    if share <= SINGLE_ROWS:
        return
    filled = float(seen.plan.tokens[is_single].mean()) / seen.plan.row_tokens
    remedy = (
        "pack: --packer balanced"
        if seen.run.packer == "none"
        else "raise --seq-length, so that long samples share rows; full ones cost most attention"
    )
    yield Finding(
        f"{int(is_single.sum()):,} of {len(seen.plan):,} rows ({100 * share:.1f} %) hold one "
        f"sample only, which fills {100 * filled:.0f} % of its row in the mean",
        remedy,
    )


@rule("alignment-waste", Severity.WARNING)
def alignment_waste(seen: Forecast) -> Iterator[Finding]:
    """Padding inside documents."""
    share = seen.padding.alignment / seen.total_tokens
    if share <= ALIGNMENT_WASTE:
        return
    align_tokens = seen.plan.align_tokens
    least, _ = alignment(
        cp_size=seen.run.cp_size,
        tp_size=seen.run.tp_size,
        sequence_parallel=seen.run.sequence_parallel,
    )
    mean = float(seen.lengths.mean())
    remedy = "less context parallelism, or longer samples: several conversations joined into one"
    if least < align_tokens:
        padded = -(-seen.lengths // least) * least
        waste = float((padded - seen.lengths).sum()) / seen.total_tokens
        remedy = (
            f"--megasft-align-tokens {least} would leave {100 * waste:.1f} %, if the run stays on "
            f"this layout and kernels need no more (FP8 needs 16)"
        )
    yield Finding(
        f"{100 * share:.1f} % of all tokens pad documents to multiples of {align_tokens}; a "
        f"sample has {mean:,.0f} tokens in the mean",
        remedy,
    )


@rule("gaps", Severity.WARNING)
def gaps(seen: Forecast) -> Iterator[Finding]:
    """Room behind the last document of rows."""
    share = seen.padding.gaps / seen.total_tokens
    if share <= GAPS:
        return
    few = seen.plan.epoch_rows < 2 / GAPS
    if seen.run.packer in KEEP_ORDER:
        remedy = "--packer balanced or best_fit, unless the order of samples matters"
    elif few:
        remedy = "a shorter --seq-length: with so few rows the last one is much of all"
    else:
        remedy = "another --seq-length: samples of more than half a row leave room that none fills"
    yield Finding(
        f"{100 * share:.1f} % of all tokens are room left at the end of {len(seen.plan):,} rows",
        remedy,
    )


@rule("stage-rows", Severity.WARNING)
def stage_rows(seen: Forecast) -> Iterator[Finding]:
    """Rows that stages of a curriculum cost, each of which ends in one not full."""
    plan = seen.plan
    stages = plan.stages[: (len(plan.stages) - 1) // plan.num_packings + 1]
    if len(stages) == 2:
        return
    padded = -(-seen.lengths // plan.align_tokens) * plan.align_tokens
    ends = plan.rows.borders[np.array(stages)]
    together = lower_bound(padded[: ends[-1]], row_tokens=plan.row_tokens)
    apart = sum(lower_bound(padded[a:b], row_tokens=plan.row_tokens) for a, b in pairwise(ends))
    if apart - together <= STAGE_ROWS * together:
        return
    yield Finding(
        f"{len(stages) - 1:,} stages are packed apart, each with a last row that is not full: "
        f"{apart:,} rows at least, where {together:,} could hold all samples",
        "fewer, larger stages, a shorter --seq-length, or curriculum: mixed",
    )


@rule("short-samples", Severity.WARNING)
def short_samples(seen: Forecast) -> Iterator[Finding]:
    """Samples that context parallelism cuts into slices of a token or none."""
    run = seen.run
    if run.cp_size == 1:
        return
    least, median = 2 * run.cp_size * run.tp_size, float(np.median(seen.lengths))
    if median >= least:
        return
    share = float((seen.lengths < least).mean())
    yield Finding(
        f"{100 * share:.0f} % of samples are shorter than {least} tokens = 2 x CP {run.cp_size} x "
        f"TP {run.tp_size}; the median has {median:,.0f}, so a rank gets slices of "
        f"{median / (2 * run.cp_size):.1f} tokens",
        "a smaller CP: rows of short samples need none for their attention",
    )


@rule("uneven-ranks", Severity.WARNING)
def uneven_ranks(seen: Forecast) -> Iterator[Finding]:
    """Ranks that wait for the slowest although rows are dealt."""
    if seen.balance is None:
        return
    after = float(seen.balance.after.mean())
    if after <= UNEVEN:
        return
    size, num_micro_batches = seen.run.shape.global_batch_size, int(seen.run.num_micro_batches)
    dealt = "a micro-batch each, so none to deal"
    if num_micro_batches > 1:
        dealt = f"{num_micro_batches:,} micro-batches each, dealt as evenly as they go"
    window = 4 if seen.run.window is None else 2 * seen.run.window.num_batches
    remedy = (
        f"more micro-batches to deal, --global-batch-size {2 * size} say; or batches of like rows, "
        f"--megasft-cost-window {window}"
    )
    yield Finding(
        f"the slowest data-parallel rank takes {after:.2f} times the mean of them: {dealt}; the "
        f"dearest row costs {seen.dearest_over_mean:.2f} times the mean row",
        remedy if seen.run.packer == "balanced" else f"--packer balanced; {remedy}",
    )


@rule("pipeline-bubble", Severity.WARNING)
def pipeline_bubble(seen: Forecast) -> Iterator[Finding]:
    """Pipeline stages that wait for the first and the last micro-batch."""
    run = seen.run
    waiting = run.pp_size - 1
    share = waiting / (run.num_micro_batches + waiting)
    if share <= BUBBLE or run.shape.global_batch_size % run.pass_rows:
        return
    enough = -(-waiting * round((1 - BUBBLE) / BUBBLE) // 1) * run.pass_rows
    yield Finding(
        f"{run.num_micro_batches:,.0f} micro-batches a rank through {run.pp_size} pipeline stages: "
        f"a stage waits {100 * share:.0f} % of a step",
        f"--global-batch-size {enough} or more, or interleaving "
        "(--num-layers-per-virtual-pipeline-stage)",
    )


RULES: Final = rules_of(sys.modules[__name__])
