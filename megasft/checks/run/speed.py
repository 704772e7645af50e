"""How long an epoch takes, from tokens per second: stated, measured by an earlier run, or assumed.

Operations of a token are those the deal of rows goes by (``packing/balance.py``: 6 per weight it
meets, and attention's scores of its document computed again in the backward pass). Without a
measurement the time is operations over the devices' peak at an assumed utilization, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import orjson

from megasft.checks.engine import Finding, Severity, rule
from megasft.checks.run.subject import Stage, Subject
from megasft.report.curves import FILE
from megasft.report.devices import peak_tflops
from megasft.training import row_order
from megasft.training.report_arguments import log_folder

ASSUMED_MFU: Final = 0.4
"""Model FLOPs utilization of a dense model on 8 to 64 GPUs that is set up well."""

STEPS_LOOKED_AT: Final = 50


class Work(NamedTuple):
    """What an epoch costs.

    Attributes:
        tokens: True tokens, padding not counted.
        operations: Floating-point operations of training on its rows, padding counted.
    """

    tokens: float
    operations: float


class Rate(NamedTuple):
    """How fast one GPU is.

    Attributes:
        tokens_per_second: True tokens.
        source: Where the number is from.
    """

    tokens_per_second: float
    source: str


def work_of_epoch(subject: Subject) -> Work:
    """Return what an epoch of the training rows costs."""
    plan = subject.data.train.plan
    costs = row_order.cost_of(subject.settled).of(plan.row_tokens, plan.squares)
    packings = plan.num_packings
    return Work(float(plan.tokens.sum()) / packings, float(costs.sum()) / packings)


def rate(subject: Subject, work: Work) -> Rate | None:
    """Return the speed of one GPU, the best known one; None where nothing is known."""
    if subject.wishes.tokens_per_second is not None:
        return Rate(subject.wishes.tokens_per_second, "as stated")
    folder = log_folder(subject.settled)
    measured = measured_rate(folder / FILE) if folder else None
    if measured is not None:
        return measured
    gpus = subject.machine.gpus
    peak = subject.settled.megasft_peak_tflops or (peak_tflops(gpus[0].name) if gpus else None)
    if peak is None:
        return None
    return Rate(
        ASSUMED_MFU * peak * 1e12 * work.tokens / work.operations,
        f"assumed: {100 * ASSUMED_MFU:.0f} % of {peak:,.0f} TFLOP/s",
    )


def measured_rate(path: Path) -> Rate | None:
    """Return the median speed of the last steps that a run logged; None where there are none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    found = []
    for line in lines[-STEPS_LOOKED_AT:]:
        try:
            value = orjson.loads(line).get("tokens_per_second")
        except orjson.JSONDecodeError:
            continue  # the last line of a run that was killed
        found += [float(value)] if value else []
    return Rate(median(found), f"measured, {path}, {len(found)} steps") if found else None


@rule("duration", Severity.NOTE, Stage.MODEL, theme="speed")
def duration(subject: Subject) -> Iterator[Finding]:
    """What an epoch computes, and its hours."""
    args, work = subject.settled, work_of_epoch(subject)
    found = rate(subject, work)
    operations = (
        f"an epoch computes {work.operations:.3g} operations, {work.operations / work.tokens:.3g} "
        f"a token"
    )
    numbers: dict[str, Any] = {"operations": work.operations, "tokens": work.tokens}
    if found is None:
        yield Finding(
            f"{operations}; how long that takes is not known here",
            "--tokens-per-second N, of one GPU, gives hours",
            numbers,
        )
        return
    hours = work.tokens / found.tokens_per_second / args.world_size / 3600
    iterations = subject.data.train.plan.epoch_rows / args.global_batch_size
    yield Finding(
        f"an epoch takes {_time(hours)} on {args.world_size} ranks at "
        f"{found.tokens_per_second:,.0f} tokens/s each ({found.source}), an iteration "
        f"{3600 * hours / iterations:.3g} s; "
        f"{operations}",
        "",
        numbers | {"hours": hours, "tokens_per_second": found.tokens_per_second},
    )


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
