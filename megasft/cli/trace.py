"""``megasft trace``: from a sample to its source line, and between samples, rows and steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from megasft.cli.marked_text import open_tokenizer, print_sample
from megasft.cli.planned import (
    DEFAULT_ALIGN_TOKENS,
    MixtureFile,
    PackerName,
    Packings,
    RowFlags,
    Seed,
    Stores,
    WindowBatches,
    plan_as_trained,
    window_of,
)
from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.packing.cost_window import CostWindow
    from megasft.packing.plan import RowPlan
    from megasft.store import TokenStore


class _Run(NamedTuple):
    """A training run as far as it decides which rows a step trains."""

    plan: RowPlan
    global_batch_size: int
    seed: int
    window: CostWindow | None


def trace(
    stores: Stores,
    sample: Annotated[int | None, typer.Option(min=0, help="sample to show, from 0")] = None,
    row: Annotated[int | None, typer.Option(min=0, help="row of the plan, from 0")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="iteration as Megatron logs it, from 1")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="the run's --seq-length")
    ] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="B", help="the run's --global-batch-size")
    ] = None,
    seed: Seed = None,
    align_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="A",
            help="least common multiple of --megasft-align-tokens and, with context parallelism, "
            f"2 x CP; or {DEFAULT_ALIGN_TOKENS}",
        ),
    ] = None,
    mixture: MixtureFile = None,
    packer: PackerName = None,
    packings: Packings = None,
    cost_window: WindowBatches = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="if the tokenizer is not where it was")
    ] = None,
) -> None:
    """Follow training data: what a sample is, which samples make a row, what a step trained.

    `megasft trace store --sample 7`

    prints its source file and line, category, turns and text, the trained part marked. With
    `--seq-length` (and `--global-batch-size`) also the row it is in (and the step that trains it).

    `megasft trace store --row 3 --seq-length 4096`

    prints the samples of a row of the plan.

    `megasft trace store --step 812 --seq-length 4096 --global-batch-size 64`

    prints the samples of a step, say one where the loss jumped. Rows and order come from the code
    that trains, so they are the run's if stores, mixture, length, seed, alignment, packer, packings
    and cost window are (and the run has no --step-batch-size-schedule, and kept its batch size).
    """
    from rich.console import Console

    from megasft.store_group import open_stores

    _check_flags(
        {"--sample": sample, "--row": row, "--step": step},
        {"--seq-length": seq_length, "--global-batch-size": global_batch_size},
        {"--seed": seed, "--align-tokens": align_tokens, "--mixture": mixture, "--packer": packer}
        | {"--packings": packings, "--cost-window": cost_window},
    )
    if tokenizer is not None and sample is None:
        raise FlagError("--tokenizer has no effect without --sample; leave it out")
    opened = open_stores(stores)
    console = Console(highlight=False, soft_wrap=True)
    if sample is not None:
        _require_below(len(opened), sample, f"--sample {sample}: {opened.name} has samples")
        _print_turns(console, opened, sample)
        print_sample(console, opened, sample, open_tokenizer(opened, tokenizer))
    if seq_length is None:
        return
    if cost_window is not None and global_batch_size is None:
        raise FlagError("--cost-window needs --global-batch-size, the rows of a step in the run")
    flags = RowFlags(seq_length, align_tokens, seed, mixture, packer, packings)
    plan, run = plan_as_trained(opened, flags).plan, None
    if global_batch_size is not None:
        window = window_of(cost_window, global_batch_size)
        run = _Run(plan, global_batch_size, flags.run_seed, window)
    if sample is not None:
        row = _print_place(console, plan, sample)
    elif row is not None:
        _require_below(
            len(plan), row, f"--row {row}: at --seq-length {seq_length} the plan has rows"
        )
        _print_row(console, opened, plan, row)
    if run is not None and row is not None:
        _print_first_step(console, run, row)
    if run is not None and step is not None:
        _print_step(console, opened, run, step)


def _check_flags(
    what: dict[str, int | None],
    sizes: dict[str, int | None],
    plan: dict[str, int | str | Path | None],
) -> None:
    """Refuse what is missing, and what would have no effect."""
    given = [flag for flag, value in what.items() if value is not None]
    if len(given) != 1:
        raise FlagError(
            f"{', '.join(given) or 'none of them'} is given; trace takes exactly one of "
            f"{', '.join(what)}"
        )
    if sizes["--seq-length"] is None:
        if given != ["--sample"]:
            raise FlagError(f"{given[0]} needs --seq-length, the tokens of a row in the run")
        for flag, value in [*sizes.items(), *plan.items()]:
            if value is not None:
                raise FlagError(f"{flag} has no effect without --seq-length; give that too")
    if given == ["--step"] and sizes["--global-batch-size"] is None:
        raise FlagError("--step needs --global-batch-size, the rows of a step in the run")


def _require_below(num: int, value: int, fact: str) -> None:
    if value >= num:
        raise FlagError(f"{fact} 0 to {num - 1:,}")


def _print_turns(console: Console, store: TokenStore, index: int) -> None:
    from megasft.data.report import categories_of
    from megasft.schema import turn_weights_of

    turns = store.sample(index).turns
    weights = turn_weights_of(turns).tolist()
    console.print(f"{store.source_line(index)}", markup=False, style="bold")
    console.print(f"  category    {categories_of(store, index)}", markup=False)
    console.print(f"  tokens      {int(store.tokens.lengths[index]):,}", markup=False)
    for number, (start, num_tokens, _, message, _) in enumerate(turns.tolist()):
        weight = "" if weights[number] == 1 else f", weight {weights[number]:.6g}"
        text = (
            f"  turn {number:<7}tokens {start:,} to {start + num_tokens - 1:,} trained "
            f"({num_tokens:,} labels), message {message}{weight}"
        )
        console.print(text, markup=False)
    if not len(turns):
        console.print("  turns       none: nothing of it is trained", markup=False)


def _print_place(console: Console, plan: RowPlan, sample: int) -> int | None:
    from megasft.packing.locate import rows_of_sample

    rows = rows_of_sample(plan, sample)
    if len(rows) > 1:
        text = f"in {len(rows):,} places: rows {', '.join(f'{row:,}' for row in rows)}"
        console.print(f"\n{text} of rows 0 to {len(plan) - 1:,}; the first:")
    elif rows:
        console.print(f"\nin row {rows[0]:,} of rows 0 to {len(plan) - 1:,}")
    elif sample in plan.too_long:
        console.print(f"\nlonger than a row of {plan.row_tokens:,} tokens: left out in training")
    else:
        console.print("\nnot drawn by the mixture: left out in training")
    return rows[0] if rows else None


def _print_first_step(console: Console, run: _Run, row: int) -> None:
    from megasft.packing.locate import first_step_of_row

    plan, size, seed, window = run
    step = first_step_of_row(plan, row, global_batch_size=size, seed=seed, window=window)
    epochs = "each epoch" if plan.num_packings == 1 else f"{plan.num_packings} epochs"
    console.print(f"trained first at step {step:,}; once in {epochs} of {len(plan):,} rows")


def _print_row(console: Console, store: TokenStore, plan: RowPlan, row: int) -> None:
    from megasft.data.report import categories_of

    samples = plan.rows[row].tolist()
    head = (
        f"row {row:,}: {len(samples):,} samples, {int(plan.turns[row]):,} turns, "
        f"{int(plan.labels[row]):,} labels, {int(plan.tokens[row]):,} of {plan.row_tokens:,} tokens"
    )
    console.print(head, style="bold")
    start = 0
    for index in samples:
        num_tokens = int(store.tokens.lengths[index])
        text = (
            f"  sample {index:<9}{num_tokens:>9,} tokens at {start:<9,} "
            f"{categories_of(store, index)}  {store.source_line(index)}"
        )
        console.print(text, markup=False)
        start += -(-num_tokens // plan.align_tokens) * plan.align_tokens


def _print_step(console: Console, store: TokenStore, run: _Run, step: int) -> None:
    from megasft.packing.locate import rows_of_step

    plan, size, seed, window = run
    rows = rows_of_step(plan, step=step, global_batch_size=size, seed=seed, window=window)
    first, last = (int(k // plan.epoch_rows) for k in ((step - 1) * size, step * size - 1))
    epochs = f"epoch {first + 1:,}" if first == last else f"epochs {first + 1:,} to {last + 1:,}"
    steps = plan.epoch_rows / size
    console.print(f"step {step:,}: {size:,} rows, {epochs} (an epoch is {steps:,.2f} steps)\n")
    for row in rows:
        _print_row(console, store, plan, row)
