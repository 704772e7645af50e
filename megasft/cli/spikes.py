"""``megasft spikes``: the conversations of a step whose loss rose, dearest first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.report.spikes import Spike

TOP: Final = 20


def spikes(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="the run's --megasft-log-dir, or its --save")
    ],
    step: Annotated[
        int | None, typer.Option(min=1, help="list the conversations of this step")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="of them the N dearest")] = TOP,
) -> None:
    """List the steps of a run whose loss rose, and the conversations of one of them by loss.

    `megasft spikes runs/turn`

    prints the steps whose loss was above `--megasft-spikes` times the median before them.

    `megasft spikes runs/turn --step 812`

    prints the conversations of one of these steps, that with the highest loss per token first,
    with the file and line they come from. `megasft trace STORE... --sample N` shows one of them.
    """
    from rich.console import Console

    from megasft.report.spikes import read_spikes

    found = read_spikes(run)
    console = Console(highlight=False, soft_wrap=True)
    if step is None:
        for spike in found:
            console.print(_head(spike))
        return
    of_step = [spike for spike in found if spike.step == step]
    if not of_step:
        steps = ", ".join(str(spike.step) for spike in found)
        raise FlagError(
            f"step {step} was no spike, so its losses were not kept; these are: {steps}"
        )
    _print_samples(console, of_step[-1], top=top)


def _head(spike: Spike) -> str:
    return (
        f"step {spike.step:,}: loss {spike.loss:.4f}, {spike.loss / spike.median:.2f} times the "
        f"median before, {spike.median:.4f}; {len(spike.samples):,} conversations"
    )


def _print_samples(console: Console, spike: Spike, *, top: int) -> None:
    from megasft.data.report import categories_of
    from megasft.store_group import open_stores

    store = open_stores([Path(path) for path in spike.stores])
    console.print(_head(spike), style="bold")
    console.print(f"{'loss':>9}  {'labels':>7}  {'sample':<9} category  source", style="dim")
    for sample, loss, labels in spike.samples[:top]:
        text = (
            f"{loss:9.4f}  {labels:7,}  {sample:<9} {categories_of(store, sample)}  "
            f"{store.source_line(sample)}"
        )
        console.print(text, markup=False)
    if len(spike.samples) > top:
        console.print(f"and {len(spike.samples) - top:,} more; --top shows more of them")
