"""Rules about a store as a whole: duplicates, lengths, and what store.json itself counts."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.checks.data.blocks import Block, Ints, blocks
from megasft.checks.data.vocabulary import Vocabulary, flags
from megasft.data import unread_keys
from megasft.schema import TURN_FIELDS
from megasft.store import TokenStore

Keys = npt.NDArray[np.uint64]

VERY_LONG: Final = 16
"""A sample is very long from this many medians on, ..."""
VERY_LONG_TOKENS: Final = 4096
"""... and never below this."""


class Hits(NamedTuple):
    """What a whole-store rule found.

    Attributes:
        num: How often it fired.
        samples: Some samples it fired on; may be fewer than ``num``.
        detail: What is special about this case.
        population: Out of how many, where that is neither samples nor turns.
    """

    num: int
    samples: list[int]
    detail: str = ""
    population: int | None = None


class Subject(NamedTuple):
    """A store and what is known about it.

    Attributes:
        store: The store.
        vocabulary: Its token ids.
        keys: uint64 [S]. Equal for samples that count as one conversation.
    """

    store: TokenStore
    vocabulary: Vocabulary
    keys: Keys


NOTHING: Final = Hits(0, [])

_LEFT_OUT: Final = {
    "dropped": "dropped as too long",
    "truncated": "truncated as too long",
    "stripped_turns": "turn not trained, as the template leaves out its thinking",
}
"""Counts of store.json to what they mean."""


def keys_of_tokens(store: TokenStore) -> Keys:
    """Hash the token ids of each sample: Σ over positions of a random number times (id + 1).

    Two of a million different samples collide with a chance below 1e-6. Costs 8 bytes a sample.
    """
    longest = int(store.tokens.lengths.max()) if len(store) else 0
    weights = np.random.default_rng(0).integers(0, 2**64, longest, np.uint64)
    keys = np.zeros(len(store), np.uint64)
    for block in blocks(store):
        keys[block.first : block.first + block.num_samples] = _keys(block, weights)
    return keys


def _keys(block: Block, weights: Keys) -> Keys:
    lengths = np.diff(block.offsets)
    position = np.arange(len(block.tokens)) - np.repeat(block.offsets[:-1], lengths)
    terms = weights[position] * (block.tokens.astype(np.uint64) + np.uint64(1))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return np.asarray(sums[block.offsets[1:]] - sums[block.offsets[:-1]], np.uint64)


def duplicate_conversation(subject: Subject) -> Hits:
    """Count samples that repeat an earlier one."""
    _, first, group = np.unique(subject.keys, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[group] != np.arange(len(subject.keys)))
    if not len(repeats):
        return NOTHING
    one = int(repeats[0])
    places = subject.store.source_line(one), subject.store.source_line(int(first[group[one]]))
    most = int(np.bincount(group).max())
    detail = f"{places[0]} repeats {places[1]}; the most frequent one is there {most:,} times"
    return Hits(len(repeats), repeats[:100].tolist(), detail)


def never_stops(subject: Subject) -> Hits:
    """Fire when no turn of the whole store trains a stop token."""
    num_turns = 0
    samples: list[int] = []
    for block in blocks(subject.store):
        stop = flags(subject.vocabulary.is_stop, block.tokens)
        if (block.count_in_turns(stop) > 0).any():
            return NOTHING
        num_turns += len(block.starts)
        samples += (block.first + block.sample[:5]).tolist()[: 5 - len(samples)]
    return Hits(num_turns, samples)


def pad_is_eos(subject: Subject) -> Hits:
    """Fire when padding and the end of a text are the same id."""
    special = subject.vocabulary.special
    if "pad" not in special or special["pad"] != special.get("eos"):
        return NOTHING
    return Hits(1, [], f"both are id {special['pad']}", population=1)


def stop_not_eos(subject: Subject) -> Hits:
    """Fire when turns end in tokens at which generation does not stop by itself."""
    special = subject.store.meta.get("special_tokens", {})
    others = sorted(set(special.get("end_of_turn", ())) - {special.get("eos")})
    if not others:
        return NOTHING
    hf = subject.vocabulary.hf
    names = ", ".join(f"{i} {hf.convert_ids_to_tokens(i)}" if hf else str(i) for i in others)
    return Hits(len(others), [], f"ends of turns: {names}; eos: {special.get('eos')}", len(others))


def very_long(subject: Subject) -> Hits:
    """Count samples far longer than the usual one."""
    lengths = subject.store.tokens.lengths
    limit = max(VERY_LONG_TOKENS, VERY_LONG * int(np.median(lengths))) if len(lengths) else 0
    return _longer_than(lengths, limit)


def longer_than_model(subject: Subject) -> Hits:
    """Count samples longer than the tokenizer says its model reads."""
    limit = getattr(subject.vocabulary.hf, "model_max_length", None)
    if limit is None or limit > 2**31:  # transformers' way to say that it does not know
        return NOTHING
    return _longer_than(subject.store.tokens.lengths, int(limit))


def border_token(subject: Subject) -> Hits:
    """Report the tokens that the build found half inside an answer."""
    counts = subject.store.meta.get("counts", {})
    return Hits(int(counts.get("border_tokens", 0)), [], population=int(_num_turns(subject)))


def left_out(subject: Subject) -> Hits:
    """Report what the build left out or changed, by reason."""
    counts = subject.store.meta.get("counts", {})
    reasons = {f"rejected: {reason}": int(n) for reason, n in counts.get("rejected", {}).items()}
    reasons |= {name: int(counts.get(key, 0)) for key, name in _LEFT_OUT.items()}
    detail = "; ".join(f"{num:,} x {reason}" for reason, num in reasons.items() if num)
    return Hits(sum(reasons.values()), [], detail, int(counts.get("conversations", 0)))


def unread_key(subject: Subject) -> Hits:
    """Report the keys of records and messages that nobody reads."""
    return _unread(subject, meant=False)


def unread_meaning(subject: Subject) -> Hits:
    """Report those that sound like a label, a prompt or a picture."""
    return _unread(subject, meant=True)


def _unread(subject: Subject, *, meant: bool) -> Hits:
    meta = subject.store.meta
    found = [
        key for key in meta.get("unread_keys", []) if unread_keys.sounds_meant(key["key"]) is meant
    ]
    detail = "; ".join(unread_keys.lines_of(found))
    num_records = max((key["num_records"] for key in found), default=0)
    return Hits(num_records, [], detail, int(meta.get("counts", {}).get("conversations", 0)))


def _longer_than(lengths: npt.NDArray[np.integer[Any]], limit: int) -> Hits:
    found: Ints = np.flatnonzero(lengths > limit)
    if not len(found):
        return NOTHING
    longest = found[np.argsort(-lengths[found], kind="stable")][:5]
    detail = f"longer than {limit:,} tokens; the longest has {int(lengths.max()):,}"
    return Hits(len(found), longest.tolist(), detail)


def _num_turns(subject: Subject) -> int:
    return int(subject.store.turns.offsets[-1]) // len(TURN_FIELDS)
