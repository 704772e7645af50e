"""``megasft inspect``: what a token store holds, and one conversation as it is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.data.report import Bin, CategoryRow
    from megasft.store import TokenStore

OPEN_MARK, CLOSE_MARK = "⟦", "⟧"
"""What stands around trained text where there is no colour."""
_BAR_WIDTH: Final = 40


def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="folder made by megasft build")],
    sample: Annotated[int, typer.Option(min=0, help="which conversation to show")] = 0,
    width: Annotated[int, typer.Option(min=0, help="columns; 0: as wide as the terminal")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="if the tokenizer is not where it was")
    ] = None,
) -> None:
    """Print counts, lengths and categories of a store, and one conversation as it is trained.

    `megasft inspect store --sample 7`

    Trained text is green, the rest is dim. Without colour (NO_COLOR, a pipe) it stands in ⟦ ⟧.
    """
    from rich.console import Console

    from megasft.data.report import category_rows, length_histogram
    from megasft.store import open_store

    opened = open_store(store)
    if sample >= len(opened):
        raise FlagError(f"--sample {sample}: {store} has samples 0 to {len(opened) - 1:,}")
    console = Console(width=width or None, highlight=False)
    _print_counts(console, opened)
    _print_categories(console, category_rows(opened))
    _print_histogram(console, length_histogram(opened.tokens.lengths))
    _print_sample(console, opened, sample, tokenizer)


def _print_counts(console: Console, store: TokenStore) -> None:
    counts, meta = store.meta["counts"], store.meta
    tokens, labels = counts["tokens"], counts["label_tokens"]
    lines = [
        ("samples", f"{counts['samples']:,} of {counts['conversations']:,} conversations"),
        ("turns", f"{counts['turns']:,}"),
        ("tokens", f"{tokens:,}, of which {labels:,} trained ({100 * labels / tokens:.1f} %)"),
        ("tokenizer", f"{meta['tokenizer']['path']}, {meta['vocab_size']:,} ids"),
        ("sources", ", ".join(source["path"] for source in meta["sources"])),
        ("fingerprint", store.fingerprint),
    ]
    lines += [("rejected", f"{n:,} x {reason}") for reason, n in counts["rejected"].items()]
    if counts["turns_without_stop"]:
        lines.append(("warning", f"{counts['turns_without_stop']:,} turns have no stop token"))
    if counts["border_tokens"]:
        lines.append(
            ("warning", f"{counts['border_tokens']:,} tokens lie half in an answer, not trained")
        )
    console.print(f"[bold]{store.path}[/bold]")
    for name, value in lines:
        console.print(f"  {name:<12}{value}", markup=False)


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


def _print_sample(console: Console, store: TokenStore, index: int, tokenizer: Path | None) -> None:
    from rich.text import Text

    from megasft.data.report import pieces
    from megasft.data.tokenize import load_tokenizer

    folder = tokenizer or Path(store.meta["tokenizer"]["path"])
    if not folder.is_dir():
        raise FlagError(f"the tokenizer is not at {folder} any more; say where with --tokenizer")
    coloured = console.is_terminal and "NO_COLOR" not in os.environ
    text = Text()
    for piece in pieces(store, index, load_tokenizer(folder)):
        if coloured:
            text.append(piece.text, style="green" if piece.trained else "dim")
        else:
            text.append(f"{OPEN_MARK}{piece.text}{CLOSE_MARK}" if piece.trained else piece.text)
    if coloured:
        legend = Text.assemble(("green", "green"), " is trained, ", ("dim", "dim"), " is context")
    else:
        legend = Text(f"{OPEN_MARK}trained{CLOSE_MARK}, the rest is context")
    sample = store.sample(index)
    head = (
        f"sample {index:,} ({store.source_line(index)}): {len(sample.tokens):,} tokens, "
        f"{int(sample.turns[:, 1].sum()):,} trained in {len(sample.turns)} turn(s); "
    )
    console.print(Text.assemble("\n", (head, "bold"), legend), soft_wrap=True)
    console.print(text, soft_wrap=True)
