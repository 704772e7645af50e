"""A store as one HTML page: counts, lengths, categories, shares of the loss, conversations.

The page is one file without scripts and without anything to load: it opens from a laptop's disk, an
artifact store or a mail. Its content security policy forbids the rest, so that a conversation which
holds markup could do nothing even if it were not escaped (Jinja escapes all of it). Folding is
``<details>`` and bars are SVG with tooltips of ``<title>``; rejected: a chart library (a megabyte,
or a network) for what rectangles show. Pages stay small: at most ``MAX_CONVERSATIONS``, evenly
spread over the store, and of each at most ``MAX_TOKENS``; the page says what it leaves out.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Final, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined

from megasft.data.gradient_mass import (
    WEIGHTINGS,
    MassRow,
    mass_by_category,
    mass_by_sample_length,
    mass_by_turn_length,
)
from megasft.data.report import (
    Bin,
    Piece,
    categories_of,
    facts,
    length_histogram,
    pieces,
    turn_lengths,
)
from megasft.store import TokenStore

MAX_CONVERSATIONS: Final = 50
MAX_TOKENS: Final = 16_384
FOLD_CHARACTERS: Final = 1_500
"""A longer conversation is folded until it is clicked."""
_TEMPLATE: Final = "page.html.jinja"
_GOLDEN_ANGLE: Final = 137.508  # neighbours differ most, however many colours there are


class Shown(NamedTuple):
    """A conversation on the page.

    Attributes:
        sample: Its number in the store.
        place: File and line it comes from.
        category: Names of its categories, most often one.
        num_tokens: All its tokens.
        num_labels: Trained ones among them.
        num_turns: Supervised turns.
        num_left_out: Tokens at its end that the page does not show.
        pieces: Its text.
        folded: It is long and opens at a click.
    """

    sample: int
    place: str
    category: str
    num_tokens: int
    num_labels: int
    num_turns: int
    num_left_out: int
    pieces: list[Piece]
    folded: bool


class Segment(NamedTuple):
    """One group in a stacked bar; sizes in thousandths of its width."""

    x: str
    width: str
    colour: str
    title: str


class MassTable(NamedTuple):
    """Shares of the loss by one property, as rows with a colour each, and as three stacked bars."""

    title: str
    column: str
    rows: list[tuple[str, MassRow]]
    bars: list[tuple[str, list[Segment]]]


def page(store: TokenStore, tokenizer: Any) -> str:
    """Return the page.

    Args:
        store: An open store with at least one sample.
        tokenizer: The Hugging Face tokenizer the store was made with.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.2f} %"
    source = resources.files("megasft.data").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    left_out = dict(store.meta["counts"]["rejected"])
    if dropped := store.meta["counts"].get("dropped"):
        left_out["too long (--too-long)"] = dropped
    return environment.from_string(source).render(
        path=str(store.path),
        facts=[(n, v) for n, v in facts(store) if n != "rejected"],
        tiles=_tiles(store),
        rejected=left_out,
        num_rejected=sum(left_out.values()),
        histograms=[
            ("Samples, by length in tokens", _bars(length_histogram(store.tokens.lengths))),
            ("Turns, by trained tokens", _bars(length_histogram(turn_lengths(store)))),
        ],
        weightings=WEIGHTINGS,
        masses=[
            _mass_table("By category", "category", mass_by_category(store), ordered=False),
            _mass_table("By length of the sample", "tokens", mass_by_sample_length(store)),
            _mass_table("By length of the turn", "trained tokens", mass_by_turn_length(store)),
        ],
        conversations=_conversations(store, tokenizer),
        num_samples=len(store),
    )


def _tiles(store: TokenStore) -> list[tuple[str, str]]:
    counts = store.meta["counts"]
    return [
        (f"{counts['samples']:,}", "samples"),
        (f"{counts['turns']:,}", "supervised turns"),
        (f"{counts['tokens']:,}", "tokens"),
        (f"{counts['label_tokens']:,}", "trained tokens"),
        (f"{100 * counts['label_tokens'] / counts['tokens']:.1f} %", "trained share"),
    ]


def _bars(bins: list[Bin]) -> list[tuple[Bin, str]]:
    """Return each bin and the width of its bar, of 1,000."""
    most = max((b.num_samples for b in bins), default=1)
    return [(b, f"{1000 * b.num_samples / most:.1f}") for b in bins]


def _mass_table(title: str, column: str, rows: list[MassRow], *, ordered: bool = True) -> MassTable:
    colours = _ramp(len(rows)) if ordered else _wheel(len(rows))
    bars = []
    for weighting in WEIGHTINGS:
        segments, done = [], 0.0
        for colour, row in zip(colours, rows, strict=True):
            share = getattr(row.shares, weighting)
            width = 1000 * float(share)
            tip = f"{row.name}: {100 * share:.2f} %"
            segments.append(Segment(f"{done:.3f}", f"{width:.3f}", colour, tip))
            done += width
        bars.append((weighting, segments))
    return MassTable(title, column, list(zip(colours, rows, strict=True)), bars)


def _wheel(num: int) -> list[str]:
    """Return colours of things without an order, such as categories."""
    return [f"hsl({(212 + i * _GOLDEN_ANGLE) % 360:.0f} 55% 58%)" for i in range(num)]


def _ramp(num: int) -> list[str]:
    """Return colours from light to dark, for lengths from short to long."""
    step = 1 / max(num - 1, 1)
    return [f"hsl({195 + 60 * i * step:.0f} 55% {80 - 45 * i * step:.0f}%)" for i in range(num)]


def _conversations(store: TokenStore, tokenizer: Any) -> list[Shown]:
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, t in added if t.special} | set(tokenizer.all_special_ids)
    num = min(len(store), MAX_CONVERSATIONS)
    chosen = np.linspace(0, len(store) - 1, num).round().astype(int).tolist()
    return [_shown(store, index, tokenizer, special) for index in chosen]


def _shown(store: TokenStore, index: int, tokenizer: Any, special: set[int]) -> Shown:
    tokens, turns = store.sample(index)
    text = pieces(store, index, tokenizer, apart=special, max_tokens=MAX_TOKENS)
    return Shown(
        index,
        store.source_line(index),
        categories_of(store, index),
        num_tokens=len(tokens),
        num_labels=int(turns[:, 1].sum()),
        num_turns=len(turns),
        num_left_out=max(len(tokens) - MAX_TOKENS, 0),
        pieces=text,
        folded=sum(len(piece.text) for piece in text) > FOLD_CHARACTERS,
    )
