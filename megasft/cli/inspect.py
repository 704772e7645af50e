"""``megasft inspect``: what a token store holds, on the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from megasft.cli.marked_text import open_tokenizer, print_sample
from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.data.report import Bin, CategoryRow
    from megasft.store import TokenStore

_BAR_WIDTH: Final = 40


def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="folder made by megasft build")],
    sample: Annotated[int, typer.Option(min=0, help="which conversation to show")] = 0,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write a page too: who gets the gradient, 50 samples"),
    ] = None,
    width: Annotated[int, typer.Option(min=0, help="columns; 0: as wide as the terminal")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="if the tokenizer is not where it was")
    ] = None,
) -> None:
    """Print counts, lengths and categories of a store, and one conversation as it is trained.

    `megasft inspect store --sample 7`

    Trained text is green, the rest is dim. Without colour (NO_COLOR, a pipe) it stands in ⟦ ⟧.

    `megasft inspect store --html store.html`

    The page is one file that opens in any browser and loads nothing. Beside the numbers above it
    shows which **share of the loss** each category and each length gets under token, sample and
    turn weighting (look at it before you choose `--megasft-loss`), and up to fifty conversations
    with the trained tokens coloured and the special tokens framed.
    """
    from rich.console import Console

    from megasft.data.report import category_rows, facts, length_histogram
    from megasft.store import open_store

    opened = open_store(store)
    if sample >= len(opened):
        raise FlagError(f"--sample {sample}: {store} has samples 0 to {len(opened) - 1:,}")
    console = Console(width=width or None, highlight=False)
    console.print(f"[bold]{opened.path}[/bold]")
    for name, value in facts(opened):
        console.print(f"  {name:<12}{value}", markup=False)
    _print_categories(console, category_rows(opened))
    _print_histogram(console, length_histogram(opened.tokens.lengths))
    loaded = open_tokenizer(opened, tokenizer)
    print_sample(console, opened, sample, loaded)
    if html is not None:
        _write_page(console, opened, loaded, html)


def _print_categories(console: Console, rows: list[CategoryRow]) -> None:
    console.print("\n[bold]categories[/bold]")
    for row in rows:
        text = (
            f"  {row.id:>6}  {row.name:<20}{row.num_turns:>12,} turns{row.num_labels:>15,} labels"
        )
        console.print(text, markup=False)


def _print_histogram(console: Console, bins: list[Bin]) -> None:
    console.print("\n[bold]sample length in tokens[/bold]")
    most = max(b.num_samples for b in bins)
    bar_width = min(_BAR_WIDTH, max(console.width - 36, 8))
    for low, high, count in bins:
        bar = "█" * -(-count * bar_width // most)
        console.print(f"  {low:>9,} - {high - 1:>9,}{count:>10,} {bar}", markup=False)


def _write_page(console: Console, store: TokenStore, tokenizer: Any, path: Path) -> None:
    from megasft.data.page import MAX_CONVERSATIONS, page

    data = page(store, tokenizer).encode()
    try:
        path.write_bytes(data)
    except OSError as error:
        raise FlagError(
            f"--html {path} cannot be written ({error.strerror}); name a file in an existing folder"
        ) from None
    shown = min(len(store), MAX_CONVERSATIONS)
    text = f"\npage: {path} ({len(data) / 1e3:,.0f} kB, {shown:,} of {len(store):,} samples)"
    console.print(text, markup=False, soft_wrap=True)
