"""What is in a store, in numbers and in one readable conversation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.schema import NO_CATEGORY, TURN_FIELDS
from megasft.store import TokenStore


class Bin(NamedTuple):
    """Samples whose length lies in ``[low, high)``."""

    low: int
    high: int
    num_samples: int


class Piece(NamedTuple):
    """Neighbouring tokens of a sample that are all trained, or all context."""

    text: str
    trained: bool


class CategoryRow(NamedTuple):
    """What one category holds; id 0 is "no category"."""

    id: int
    name: str
    num_turns: int
    num_labels: int


def length_histogram(lengths: npt.NDArray[np.int32]) -> list[Bin]:
    """Count samples in bins whose borders are powers of two, from the shortest to the longest.

    Example:
        >>> length_histogram(np.array([5, 7, 8], np.int32))
        [Bin(low=4, high=8, num_samples=2), Bin(low=8, high=16, num_samples=1)]
    """
    if not len(lengths):
        return []
    exponents = np.frexp(np.maximum(lengths, 1))[1] - 1  # exact floor(log2), unlike np.log2
    counts = np.bincount(exponents)
    first = int(exponents.min())
    return [Bin(2**e, 2 ** (e + 1), int(counts[e])) for e in range(first, len(counts))]


def category_rows(store: TokenStore) -> list[CategoryRow]:
    """Count turns and label tokens of each category, in the order of their ids."""
    turns = np.asarray(store.turns.values).reshape(-1, len(TURN_FIELDS))
    ids = turns[:, TURN_FIELDS.index("category_id")]
    tokens = turns[:, TURN_FIELDS.index("num_tokens")]
    names = {NO_CATEGORY: "(none)"} | {int(i): n for i, n in store.meta["categories"].items()}
    return [
        CategoryRow(
            int(i), names.get(int(i), str(i)), int((ids == i).sum()), int(tokens[ids == i].sum())
        )
        for i in np.unique(ids)
    ]


def pieces(store: TokenStore, index: int, tokenizer: Any) -> list[Piece]:
    """Return the text of a sample, cut where training starts and stops.

    Args:
        store: An open store.
        index: Sample to show.
        tokenizer: The Hugging Face tokenizer the store was made with.
    """
    tokens, turns = store.sample(index)
    found, shown = [], 0
    for start, num_tokens, *_ in turns.tolist():
        found += [(shown, start, False), (start, start + num_tokens, True)]
        shown = start + num_tokens
    found.append((shown, len(tokens), False))
    return [
        Piece(tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False), trained)
        for a, b, trained in found
        if a < b
    ]
