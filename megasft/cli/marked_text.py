"""A sample's text on the terminal, its trained part green, or in ⟦ ⟧ where there is no colour."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.store import TokenStore

OPEN_MARK, CLOSE_MARK = "⟦", "⟧"
"""What stands around trained text where there is no colour."""
_MARKED_LEGEND: Final = f"{OPEN_MARK}trained{CLOSE_MARK}, the rest is context"


def open_tokenizer(store: TokenStore, folder: Path | None) -> Any:
    """Load the tokenizer a store was made with, from where it was or from where it is now.

    Raises:
        FlagError: It is not there.
    """
    from megasft.data.tokenizer_folder import load_tokenizer

    folder = folder or Path(store.meta["tokenizer"]["path"])
    if not folder.is_dir():
        raise FlagError(f"the tokenizer is not at {folder} any more; say where with --tokenizer")
    return load_tokenizer(folder, needs_template=False)  # it only decodes


def print_sample(console: Console, store: TokenStore, index: int, tokenizer: Any) -> None:
    """Print where a sample comes from, its size, and its text with the trained part marked."""
    from rich.text import Text

    from megasft.data.report import pieces

    coloured = console.is_terminal and "NO_COLOR" not in os.environ
    text = Text()
    for piece in pieces(store, index, tokenizer):
        if coloured:
            text.append(piece.text, style="green" if piece.trained else "dim")
        else:
            text.append(f"{OPEN_MARK}{piece.text}{CLOSE_MARK}" if piece.trained else piece.text)
    if coloured:
        legend = Text.assemble(("green", "green"), " is trained, ", ("dim", "dim"), " is context")
    else:
        legend = Text(_MARKED_LEGEND)
    sample = store.sample(index)
    head = (
        f"sample {index:,} ({store.source_line(index)}): {len(sample.tokens):,} tokens, "
        f"{int(sample.turns[:, 1].sum()):,} trained in {len(sample.turns)} turn(s); "
    )
    console.print(Text.assemble("\n", (head, "bold"), legend), soft_wrap=True)
    console.print(text, soft_wrap=True)
