"""What is in a store, in numbers and in one readable conversation."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megasft.data.unread_keys import lines_of
from megasft.schema import NO_CATEGORY, TURN_FIELDS
from megasft.store import TokenStore


class Bin(NamedTuple):
    """Samples (or turns) whose length lies in ``[low, high)``."""

    low: int
    high: int
    num_samples: int

    @classmethod
    def at(cls, exponent: int, num_samples: int) -> Self:
        """Return the bin of the lengths that start with the same power of two."""
        return cls(2**exponent, 2 ** (exponent + 1), num_samples)

    @property
    def name(self) -> str:
        """The lengths it holds: ``4 – 7``, or ``1``."""
        return f"{self.low:,} – {self.high - 1:,}" if self.high - self.low > 1 else f"{self.low}"


class Piece(NamedTuple):
    """Neighbouring tokens of a sample that are all trained, or all context.

    Attributes:
        text: What they say.
        trained: Whether they are trained.
        special: It is one token, and one of those that were to stand apart.
    """

    text: str
    trained: bool
    special: bool = False


class CategoryRow(NamedTuple):
    """What one category holds; id 0 is "no category"."""

    id: int
    name: str
    num_turns: int
    num_labels: int


def facts(store: TokenStore) -> list[tuple[str, str]]:
    """Return what a store holds, where it comes from and what was left out, as names and texts."""
    counts, meta = store.meta["counts"], store.meta
    tokens, labels = counts["tokens"], counts["label_tokens"]
    lines = [
        ("samples", f"{counts['samples']:,} of {counts['conversations']:,} conversations"),
        ("turns", f"{counts['turns']:,}"),
        *([("weights", str(store.weights))] if store.weights else []),
        ("tokens", f"{tokens:,}, of which {labels:,} trained ({100 * labels / tokens:.1f} %)"),
        ("tokenizer", f"{meta['tokenizer']['path']}, {meta['vocab_size']:,} ids"),
        ("sources", ", ".join(source["path"] for source in meta["sources"])),
        ("fingerprint", store.fingerprint),
    ]
    lines += [("rejected", f"{n:,} x {reason}") for reason, n in counts["rejected"].items()]
    cut, dropped = counts.get("truncated", 0), counts.get("dropped", 0)
    if cut or dropped:
        lost, labels = counts["lost_tokens"], counts["lost_label_tokens"]
        share = 100 * lost / (tokens + lost)
        lines.append(
            (
                "too long",
                f"{cut:,} cut, {dropped:,} dropped; lost {lost:,} tokens ({share:.1f} % of all), "
                f"{labels:,} of them trained",
            )
        )
    if counts.get("stripped_turns"):
        lines.append(
            (
                "warning",
                f"{counts['stripped_turns']:,} answers are not trained: the template leaves out "
                "their thinking",
            )
        )
    lines += [("not read", line) for line in lines_of(meta.get("unread_keys", []))]
    if counts["turns_without_stop"]:
        lines.append(("warning", f"{counts['turns_without_stop']:,} turns have no stop token"))
    if counts["border_tokens"]:
        lines.append(
            ("warning", f"{counts['border_tokens']:,} tokens lie half in an answer, not trained")
        )
    return lines


def bin_of(lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Return floor(log2) of each length, exactly (unlike ``np.log2``); 0 counts as 1."""
    return np.asarray(np.frexp(np.maximum(lengths, 1))[1] - 1, np.int64)


def length_histogram(lengths: npt.NDArray[np.integer[Any]]) -> list[Bin]:
    """Count samples in bins whose borders are powers of two, from the shortest to the longest.

    Example:
        >>> length_histogram(np.array([5, 7, 8], np.int32))
        [Bin(low=4, high=8, num_samples=2), Bin(low=8, high=16, num_samples=1)]
    """
    if not len(lengths):
        return []
    exponents = bin_of(lengths)
    counts = np.bincount(exponents)
    first = int(exponents.min())
    return [Bin.at(e, int(counts[e])) for e in range(first, len(counts))]


def turn_lengths(store: TokenStore) -> npt.NDArray[np.int32]:
    """Return int32 [turns of the store]: the label tokens of each turn."""
    turns = np.asarray(store.turns.values, dtype=np.int32).reshape(-1, len(TURN_FIELDS))
    return turns[:, TURN_FIELDS.index("num_tokens")]


def category_names(store: TokenStore) -> dict[int, str]:
    """Return the name of each category id, that of "no category" too."""
    return {NO_CATEGORY: "(none)"} | {int(i): n for i, n in store.meta["categories"].items()}


def categories_of(store: TokenStore, index: int) -> str:
    """Return the categories of a sample's turns, most often one, as a text."""
    names = category_names(store)
    ids = dict.fromkeys(store.sample(index).turns[:, TURN_FIELDS.index("category_id")].tolist())
    return ", ".join(names.get(i, str(i)) for i in ids) or names[NO_CATEGORY]


def category_rows(store: TokenStore) -> list[CategoryRow]:
    """Count turns and label tokens of each category, in the order of their ids."""
    turns = np.asarray(store.turns.values).reshape(-1, len(TURN_FIELDS))
    ids = turns[:, TURN_FIELDS.index("category_id")]
    tokens = turns[:, TURN_FIELDS.index("num_tokens")]
    names = category_names(store)
    return [
        CategoryRow(
            int(i), names.get(int(i), str(i)), int((ids == i).sum()), int(tokens[ids == i].sum())
        )
        for i in np.unique(ids)
    ]


def pieces(
    store: TokenStore,
    index: int,
    tokenizer: Any,
    *,
    apart: Collection[int] = (),
    max_tokens: int | None = None,
) -> list[Piece]:
    """Return the text of a sample, cut where training starts and stops.

    Args:
        store: An open store.
        index: Sample to show.
        tokenizer: The Hugging Face tokenizer the store was made with.
        apart: Token ids that are pieces of their own, such as the special ones.
        max_tokens: Stop after so many tokens; ``None``: all of them.
    """
    tokens, turns = store.sample(index)
    tokens = tokens[:max_tokens]
    trained = np.zeros(len(tokens), bool)
    special = np.isin(tokens, list(apart))
    alone = np.flatnonzero(special)
    for start, num_tokens, *_ in turns.tolist():
        trained[start : start + num_tokens] = True
    ends = turns[:, 0] + turns[:, 1]
    cuts = np.concatenate([[0, len(tokens)], turns[:, 0], ends, alone, alone + 1])
    borders = np.unique(np.minimum(cuts, len(tokens))).astype(np.int64).tolist()
    return [
        Piece(
            tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False),
            bool(trained[a]),
            bool(special[a]),
        )
        for a, b in pairwise(borders)
    ]
