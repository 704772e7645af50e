"""``megasft prove``: the same loss and gradients on every layout, shown by running them."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import orjson
import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.proof.prove import Settings
    from megasft.proof.verdict import Verdict


EACH: Final = 20
"""Runs after which a line is printed where a bar cannot be drawn, as in a log."""


class Model(StrEnum):
    """Families of small models."""

    QWEN3 = "qwen3"
    LLAMA = "llama"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    DEEPSEEK_V3 = "deepseek_v3"


class Loss(StrEnum):
    """Objectives."""

    TURN = "turn"
    SAMPLE = "sample"
    TOKEN = "token"
    DFT = "dft"
    ROUTER = "router"
    WEIGHTS = "weights"
    NORMALIZED = "normalized"


class Device(StrEnum):
    """Where ranks run."""

    CPU = "cpu"
    CUDA = "cuda"


class Break(StrEnum):
    """Known defects."""

    CP_SEAM = "cp-seam"
    DOUBLE_COUNT = "double-count"
    PER_ROW_MEAN = "per-row-mean"
    TOKEN_DIVISOR = "token-divisor"


def prove(
    model: Annotated[
        list[Model] | None, typer.Option(help="family of the small model; again for more")
    ] = None,
    loss: Annotated[
        list[Loss] | None,
        typer.Option(
            help="objective; again for more. router: turn, with MoE aux and z-loss on; weights, "
            "normalized: random weights of turns, on llama and on qwen2_moe"
        ),
    ] = None,
    layouts: Annotated[
        str, typer.Option(metavar="NAMES", help="parts of layout names, as 'CP 4,EP 2'")
    ] = "",
    max_ranks: Annotated[
        int, typer.Option(min=1, metavar="N", help="most processes; one per GPU on cuda")
    ] = 8,
    device: Annotated[Device, typer.Option(help="cpu: gloo, on any machine")] = Device.CPU,
    defect: Annotated[
        Break | None,
        typer.Option("--break", help="inject a known defect, to see the proof fail (exit code 1)"),
    ] = None,
    report: Annotated[Path, typer.Option(metavar="FILE", help="Markdown report to write")] = Path(
        "proof.md"
    ),
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the same as JSON, every run")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="keep store, models and logs here (default: temporary)"),
    ] = None,
) -> None:
    """Prove that loss, gradients and the optimizer step do not depend on the layout.

    Builds a small random model, trains its first step with the real Megatron on every layout up to
    `--max-ranks`, and compares the loss, **every** gradient and the parameters after the step with
    plain Hugging Face in float64. Exit code 0 means that all of them are equal.

    `megasft prove --max-ranks 2 --loss turn` takes two minutes on a laptop, everything less
    than 15 on two cores; the first line says how long it will take here.
    """
    from rich.console import Console

    from megasft.proof import report as reports
    from megasft.proof.prove import Settings

    logging.getLogger("torch").setLevel(logging.ERROR)
    console = Console()
    with _folder(folder) as place:
        settings = Settings(
            families=tuple(model or Model),
            objectives=tuple(loss or ([Loss.TURN] if defect else Loss)),
            layouts=tuple(part.strip() for part in layouts.split(",") if part.strip()),
            max_ranks=max_ranks,
            device=device,
            defect=defect,
            folder=place,
        )
        _require_runs(settings)
        verdicts = _run(console, settings)
    console.print(reports.table(verdicts))
    command = shlex.join(["megasft", *sys.argv[1:]])
    report.write_text(reports.markdown(verdicts, settings, command=command))
    if json:
        json.write_bytes(orjson.dumps([v.as_dict() for v in verdicts], option=orjson.OPT_INDENT_2))
    is_exact = all(v.is_exact for v in verdicts)
    console.print(reports.conclusion(verdicts), style="bold green" if is_exact else "bold red")
    console.print(f"report: {report}")
    raise typer.Exit(0 if is_exact else 1)


def _require_runs(settings: Settings) -> None:
    """Refuse a choice that leaves nothing to run.

    Raises:
        FlagError: None of the models is run with one of the objectives.
    """
    from megasft.proof.families import FAMILIES

    families, objectives = settings.families, settings.objectives
    if not any(FAMILIES[family].objectives(objectives) for family in families):
        raise FlagError(
            f"{', '.join(objectives)} is not run on {', '.join(families)}; leave --model out"
        )


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="megasft-proof-") as temporary:
        yield Path(temporary)


def _run(console: Console, settings: Settings) -> list[Verdict]:
    """Run the proof behind a progress bar that tells the time left and names the last layout."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from megasft.proof.pace import announcement, expected_seconds
    from megasft.proof.prove import prove

    cores, order, expected = os.cpu_count() or 1, list[int](), list[float]()
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (BarColumn(), *clocks, TextColumn("left  {task.description}"))
    # The time left is what is expected of the runs to come, at the pace of those that have ended.
    with Progress(*columns, console=console, speed_estimate_period=86_400) as progress:
        task = progress.add_task("making models")

        def announce(ranks: Sequence[int]) -> None:
            order.extend(ranks)
            expected.extend(expected_seconds(ranks, cores=cores))
            progress.console.print(announcement(ranks, cores=cores), highlight=False)
            progress.update(task, total=sum(expected))

        def done(verdict: Verdict) -> None:
            name = f"{verdict.family}, {verdict.layout}, {verdict.objective}"
            progress.update(task, advance=expected.pop(0), description=name)
            num_done = len(order) - len(expected)
            if not console.is_terminal and num_done % EACH == 0:
                progress.console.print(f"{num_done} of {len(order)} runs", highlight=False)
            if not verdict.is_exact:
                why = verdict.failure or f"gradient off by {verdict.gradient_error:.1e}"
                progress.console.print(f"not exact: {name}: {why}", style="red", highlight=False)

        return prove(settings, announce=announce, done=done)
