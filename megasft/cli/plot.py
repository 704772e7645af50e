"""``megasft plot``: the curves of several runs as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megasft.errors import MissingPackageError


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="folders of runs (--megasft-log-dir or --save), or their steps.jsonl",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write")] = Path("runs.png"),
    most_categories: Annotated[
        int, typer.Option(min=0, metavar="N", help="draw the N categories with the most labels")
    ] = 12,
) -> None:
    """Draw losses, gradient norm, learning rate, speed and categories of runs as one PNG.

    Faint lines are the values, strong ones their running mean; dotted ones with marks are
    validation.

    `megasft plot runs/turn runs/token --output compared.png`
    """
    from megasft.compat import has
    from megasft.report.curves import read_runs

    if not has("matplotlib"):
        raise MissingPackageError("megasft plot draws with matplotlib; pip install megasft[plot]")
    from megasft.report.plot import draw

    curves = read_runs(runs)
    num_panels = draw(curves, output, most_categories=most_categories)
    for run in curves:
        steps = run.train["seconds"]
        print(f"{run.name}: {len(steps):,} steps, {min(steps)} to {max(steps)}{_losses(run.train)}")
    print(f"{output}: {num_panels} panels")


def _losses(train: dict[str, dict[int, float]]) -> str:
    curve = list(train.get("loss", {}).values())
    return f", loss {curve[0]:.4f} -> {curve[-1]:.4f}" if curve else ""
