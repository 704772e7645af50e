"""``megasft plan``: what a training run on these stores will see, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.cli.findings_output import STYLES, new_console, print_hanging, write_json
from megasft.cli.planned import (
    DEFAULT_ALIGN_TOKENS,
    MixtureFile,
    PackerName,
    Packings,
    Planned,
    RowFlags,
    Seed,
    Stores,
    WindowBatches,
    document_alignment,
    plan_as_trained,
    plans_by_packer,
    window_of,
)
from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.checks.engine import Finding
    from megasft.packing.balance import Cost
    from megasft.packing.forecast import Forecast, PackerFigures, Run
    from megasft.store import TokenStore

_NAME_COLUMNS: Final = 18
_IF_UNKNOWN: Final = ", since no --model-config says which model it is"


def plan(
    stores: Stores,
    seq_length: Annotated[
        int, typer.Option(min=1, metavar="N", help="the run's --seq-length, tokens of a row")
    ],
    dp: Annotated[int, typer.Option(min=1, metavar="D", help="data-parallel ranks")] = 1,
    cp: Annotated[int, typer.Option(min=1, metavar="C", help="context-parallel ranks")] = 1,
    tp: Annotated[int, typer.Option(min=1, metavar="T", help="tensor-parallel ranks")] = 1,
    pp: Annotated[int, typer.Option(min=1, metavar="P", help="pipeline stages")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="the run's --sequence-parallel")
    ] = False,
    micro_batch_size: Annotated[
        int, typer.Option(min=1, metavar="M", help="the run's --micro-batch-size")
    ] = 1,
    global_batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="B", help="the run's --global-batch-size, or D x M"),
    ] = None,
    seed: Seed = None,
    align_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="A", help=f"the run's --megasft-align-tokens, or {DEFAULT_ALIGN_TOKENS}"
        ),
    ] = None,
    packer: PackerName = None,
    packings: Packings = None,
    cost_window: WindowBatches = None,
    mixture: MixtureFile = None,
    model_config: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Hugging Face folder of the model; or Llama 3 8B"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="compare the packers")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw histograms, a PNG")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the numbers as JSON too")
    ] = None,
) -> None:
    """Tell what a training run will see: rows, padding, steps, balance, and what will bite.

    `megasft plan store --seq-length 32768 --dp 8 --cp 2 --tp 4 --global-batch-size 64`

    Rows, order and deal come from the code that trains, so the numbers are those of its log. Give
    the run's flags (those of megasft without `--megasft-`); defaults are training's. Nothing is
    trained, and neither torch nor a GPU is needed.

    `megasft plan store --seq-length 32768 --dp 8 --model-config ./Qwen3-30B-A3B --plot plan.png`

    What a row costs depends on the model: its `config.json` says how dear attention is to it.

    Exit code **0**: the run can start; **1**: it cannot, an error says why; **2**: wrong use.
    """
    from megasft.checks.plan import cautions
    from megasft.packing.balance import BatchShape
    from megasft.packing.forecast import Run, figures_of, forecast
    from megasft.packing.pack import DEFAULT_PACKER
    from megasft.store_group import open_stores

    flags = RowFlags(seq_length, align_tokens, seed, mixture, packer, packings)
    size = global_batch_size or dp * micro_batch_size
    run = Run(
        BatchShape(size, dp, micro_batch_size),
        seed=flags.run_seed,
        packer=packer or DEFAULT_PACKER,
        cp_size=cp,
        tp_size=tp,
        pp_size=pp,
        sequence_parallel=sequence_parallel,
        window=window_of(cost_window, size),
    )
    align_tokens = document_alignment(
        flags, cp_size=cp, tp_size=tp, sequence_parallel=sequence_parallel
    )
    flags = flags._replace(align_tokens=align_tokens)
    cost, model = _cost(model_config)
    store = open_stores(stores)
    planned = plan_as_trained(store, flags)
    seen = forecast(store, planned.plan, run, cost)
    found = cautions(seen)
    plans = plans_by_packer(store, flags, planned) if compare else ()
    figures = {name: figures_of(of_packer, run, cost) for name, of_packer in plans}
    console = new_console()
    _print_epoch(console, store, planned, seen)
    _print_steps(console, seen)
    _print_balance(console, seen, model)
    _print_packers(console, figures, run)
    _print_cautions(console, found)
    if plot is not None:
        _plot(console, seen, plot)
    if json is not None:
        packers = {name: one.as_json() for name, one in figures.items()}
        told = [
            {"name": one.rule, "severity": one.severity, "fact": one.fact, "remedy": one.remedy}
            for one in found
        ]
        numbers = seen.as_json() | {"model": model, "packers": packers, "cautions": told}
        write_json(numbers, json, error_type=FlagError)
    if any(caution.severity == "error" for caution in found):
        raise typer.Exit(1)


def _many(num: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{num:,} {what if num == 1 else plural}"


def _cost(model_config: Path | None) -> tuple[Cost, str]:
    """Return what a document costs, and the name of the model it was counted for."""
    from megasft.packing.balance import LLAMA_8B
    from megasft.packing.forecast_cost import read_cost

    if model_config is None:
        return LLAMA_8B, "Llama 3 8B"
    return read_cost(model_config), str(model_config)


def _print_facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=_NAME_COLUMNS)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(Text(f"  {name}"), Text(value))
    console.print(Text(title, style="bold"))
    console.print(grid)


def _print_epoch(console: Console, store: TokenStore, planned: Planned, seen: Forecast) -> None:
    from rich.padding import Padding
    from rich.text import Text

    plan, size = seen.plan, seen.run.shape.global_batch_size
    _print_facts(console, "epoch", _epoch_facts(store, planned, seen))
    for warning in planned.draw.warnings if planned.draw else ():
        console.print(f"  {warning}", markup=False, style="yellow")
    line = f"train: {plan.summary(global_batch_size=size)}"
    console.print("\nthe run will log", style="bold")
    console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def _epoch_facts(store: TokenStore, planned: Planned, seen: Forecast) -> Iterator[tuple[str, str]]:
    plan, size, total = seen.plan, seen.run.shape.global_batch_size, seen.total_tokens
    samples, turns, tokens, labels = (
        int(values.sum()) // plan.num_packings
        for values in (seen.samples_per_row, plan.turns, plan.tokens, plan.labels)
    )
    yield "rows", f"{plan.epoch_rows:,.0f} of {plan.row_tokens:,} tokens"
    yield "iterations", f"{seen.iterations:,.2f} of {size:,} rows"
    yield "samples", f"{samples:,} of {len(store):,} in {store.name}"
    yield "turns", f"{turns:,}"
    yield "tokens", f"{tokens:,}, of which {labels:,} labels ({100 * labels / tokens:.1f} %)"
    alignment, gaps = (100 * part / total for part in seen.padding)
    yield (
        "padding",
        f"{alignment + gaps:.2f} %: {alignment:.2f} % in documents, to multiples of "
        f"{plan.align_tokens}; {gaps:.2f} % at the end of rows",
    )
    if plan.num_packings > 1:
        yield "packings", f"{plan.num_packings}, one an epoch, {len(plan):,} rows in all"
    for part in planned.draw.parts if planned.draw else ():
        yield "mixture", f"{part.name}: {part.drawn:,} samples drawn of {part.found:,}"
    stages = planned.draw.stages if planned.draw else ()
    if len(stages) > 1:
        for stage, (start, end) in zip(stages, pairwise(plan.stages), strict=False):
            text = f"{stage.name}: {end - start:,} rows, iterations"
            yield "stage", f"{text} {start / size:,.2f} to {end / size:,.2f} of each epoch"
    num, lost, longest, first = seen.too_long
    if num:
        text = f"{num:,} samples longer than a row, {lost:,} tokens; the longest has {longest:,}"
        yield "left out", f"{text}; first: {store.source_line(first)}"


def _print_steps(console: Console, seen: Forecast) -> None:
    from rich.table import Table

    from megasft.packing.forecast import Spread

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("", min_width=_NAME_COLUMNS)
    for title in ("least", "mean", "most"):
        table.add_column(title, justify="right", min_width=10)
    spreads = {"samples of a row": Spread.of(seen.samples_per_row)} | {
        f"{name} of a step": Spread.of(values) for name, values in seen.steps._asdict().items()
    }
    for name, (least, mean, most) in spreads.items():
        digits = 1 if mean < 1_000 else 0
        table.add_row(f"  {name}", f"{least:,.0f}", f"{mean:,.{digits}f}", f"{most:,.0f}")
    console.print(f"\n[bold]rows and steps[/bold], over {_many(len(seen.steps.turns), 'step')}")
    console.print(table)


def _print_balance(console: Console, seen: Forecast, model: str) -> None:
    run = seen.run
    size, dp_size, micro_batch_size = run.shape
    num_ranks = dp_size * run.cp_size * run.tp_size * run.pp_size
    facts = [
        (
            "ranks",
            f"{num_ranks:,} = DP {dp_size} x CP {run.cp_size} x TP {run.tp_size} x PP "
            f"{run.pp_size}; in a step each DP rank trains {size / dp_size:,.5g} in micro-batches "
            f"of {_many(micro_batch_size, 'row')}",
        ),
        ("costs", f"those of {model}" + _IF_UNKNOWN * (model == "Llama 3 8B")),
        ("dearest row", f"{seen.dearest_over_mean:.3f} times the mean"),
    ]
    if seen.balance is not None:
        before, after = (ratios.mean() for ratios in seen.balance)
        text = f"{after:.3f} times the mean of ranks, and {before:.3f} times without the deal"
        facts.append(("slowest rank", f"{text} ({_many(len(seen.balance.after), 'global batch')})"))
    console.print()
    _print_facts(console, "balance", facts)


def _print_packers(console: Console, figures: Mapping[str, PackerFigures], run: Run) -> None:
    from rich.table import Table

    if not figures:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("", min_width=_NAME_COLUMNS)
    titles = ("rows", "padding", "samples a row", "dearest row", "slowest rank", "undealt", "time")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, one in figures.items():
        least, _, most = one.samples_per_row
        ratios = ("-", "-")
        if one.balance is not None:
            ratios = (f"{one.balance.after.mean():.3f}", f"{one.balance.before.mean():.3f}")
        chosen = name == run.packer
        table.add_row(
            f"{'* ' if chosen else '  '}{name}",
            f"{one.num_rows:,.0f}",
            f"{100 * one.padding:.2f} %",
            f"{least:,.0f} to {most:,.0f}",
            f"{one.dearest_over_mean:.3f}",
            *ratios,
            f"{one.epoch_cost / figures[run.packer].epoch_cost:.3f}",
            style="bold" if chosen else "",
        )
    console.print(
        "\n[bold]packers[/bold] (costs over the mean; time of an epoch over that of the run's, *)"
    )
    console.print(table)


def _print_cautions(console: Console, found: Sequence[Finding]) -> None:
    from rich.text import Text

    console.print()
    if not found:
        console.print("nothing that will bite", style="bold green")
    for caution in found:
        name = (f"{caution.severity} {caution.rule}", STYLES[caution.severity])
        print_hanging(console, Text.assemble(name, ": "), caution.fact, indent=0)
        remedy = Text.assemble("  ", ("remedy: ", "dim"))
        print_hanging(console, remedy, caution.remedy, indent=2)


def _plot(console: Console, seen: Forecast, path: Path) -> None:
    from megasft.packing.forecast_plot import plot_forecast

    plot_forecast(seen, path)
    console.print(f"\nhistograms: {path}", markup=False, soft_wrap=True)
