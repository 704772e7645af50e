"""What lint's rules look at: a store in blocks of samples, and what is known of each token id.

A block holds some four million tokens whatever the store's size, as flat arrays: rules need no loop
over samples, memory stays flat, and one pass runs at the speed of numpy. Turn records that point
outside their sample (a store that another program wrote) are kept apart, so that one bad record is
one finding and breaks no other rule.

Tables over the vocabulary turn questions about text into look-ups in an array, so they are asked of
every token of a store and not of a few decoded samples. Without the tokenizer only the ids that
store.json names are known; rules that need more then say that they did not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.schema import TURN_FIELDS
from megasft.store import SequenceFile, TokenStore

MAX_EXAMPLES: Final = 5
BLOCK_TOKENS: Final = 4 * 2**20
_WIDTH: Final = len(TURN_FIELDS)

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


_MEANT_IN_ANSWERS: Final = re.compile(r"tool|call|python|think|reason|channel|message", re.I)
"""Special tokens that answers do hold: marks of tool calls and of thinking."""


class Needs(StrEnum):
    """What a rule looks at, the first five, and what it cannot do without.

    ``STORE`` and ``IDS`` see everything, ``TEXT`` and ``RECORD`` some samples; ``BUILD`` is
    answered by the build itself, where files are linted.
    """

    STORE = "store"
    IDS = "ids"
    TEXT = "text"
    RECORD = "record"
    BUILD = "build"
    TOKENIZER = "tokenizer"
    SAME_TOKENS = "same tokens"


class Block(NamedTuple):
    """Consecutive samples of a store; all positions count from the block's first token.

    Attributes:
        first: Index of its first sample in the store.
        tokens: dtype [T]. Token ids, end to end.
        offsets: int64 [S + 1]. Where each sample starts.
        starts: int64 [N]. First trained token of each sound turn.
        ends: int64 [N]. Behind its last trained token.
        sample: int64 [N]. Sample of each sound turn, from 0 in this block.
        unsound: int64. Sample of each turn record that is empty, overlaps or leaves its sample.
    """

    first: int
    tokens: npt.NDArray[np.integer[Any]]
    offsets: Ints
    starts: Ints
    ends: Ints
    sample: Ints
    unsound: Ints

    @property
    def num_samples(self) -> int:
        """Samples in this block."""
        return len(self.offsets) - 1

    @property
    def whole(self) -> Bools:
        """Turns that are all of their sample but its first token: nobody chose an answer there."""
        is_first = self.starts == self.offsets[self.sample] + 1
        is_last = self.ends == self.offsets[self.sample + 1]
        return np.asarray(is_first & is_last, bool)

    def labels_of_samples(self) -> Ints:
        """Return int64 [S]: trained tokens of each sample."""
        sums = np.zeros(self.num_samples, np.int64)
        np.add.at(sums, self.sample, self.ends - self.starts)
        return sums

    def count_in_turns(self, flagged: Bools, *, but_last: bool = False) -> Ints:
        """Return int64 [N]: flagged tokens in each turn, its last token left out if asked."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(flagged, dtype=np.int64)])
        return np.asarray(before[self.ends - but_last] - before[self.starts], np.int64)


def blocks(store: TokenStore, *, block_tokens: int = BLOCK_TOKENS) -> Iterator[Block]:
    """Yield all samples of a store, in order."""
    offsets, first = _file(store).offsets, 0
    while first < len(store):
        wanted = offsets[first] + block_tokens
        last = max(int(np.searchsorted(offsets, wanted, "right")) - 1, first + 1)
        yield _block(store, first, min(last, len(store)))
        first = last


def _block(store: TokenStore, first: int, last: int) -> Block:
    file = _file(store)
    begin, end = file.offsets[first], file.offsets[last]
    offsets = file.offsets[first : last + 1] - begin
    turn_offsets = store.turns.offsets[first : last + 1]
    turns = store.turns.views(np.arange(first, last))
    records = np.concatenate(turns).astype(np.int64).reshape(-1, _WIDTH)
    sample = np.repeat(np.arange(last - first), np.diff(turn_offsets) // _WIDTH)
    starts = offsets[sample] + records[:, TURN_FIELDS.index("start")]
    ends = starts + records[:, TURN_FIELDS.index("num_tokens")]
    sound = (starts > offsets[sample]) & (starts < ends) & (ends <= offsets[sample + 1])
    # A turn that begins before the one ahead of it ends; [2, 6) then [5, 8) -> the second.
    follows = np.concatenate([[False], sample[1:] == sample[:-1]]).astype(bool)[: len(sample)]
    sound &= ~(follows & (starts < np.concatenate([[0], ends[:-1]])[: len(starts)]))
    tokens = file.values[begin:end]
    return Block(first, tokens, offsets, starts[sound], ends[sound], sample[sound], sample[~sound])


def _file(store: TokenStore) -> SequenceFile:
    assert isinstance(store.tokens, SequenceFile), "lint opens one store, not several as one"
    return store.tokens


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Facts about token ids; a table is bool [V].

    Attributes:
        special: bos, eos and pad as store.json names them; an id may be missing.
        stops: Ids that end a turn.
        is_stop: Table of ``stops``.
        is_control: Special tokens that have no place inside an answer, the stops among them.
        is_blank: White space alone; all False without the tokenizer.
        is_newline: Begins with a line end; all False without the tokenizer.
        hf: The Hugging Face tokenizer, or None.
    """

    special: dict[str, int]
    stops: frozenset[int]
    is_stop: Bools
    is_control: Bools
    is_blank: Bools
    is_newline: Bools
    hf: Any = None


def vocabulary_of(store: TokenStore, hf: Any = None) -> Vocabulary:
    """Read the special ids of store.json, and the texts of all ids where there is a tokenizer."""
    named = store.meta.get("special_tokens", {})
    special = {k: int(named[k]) for k in ("bos", "eos", "pad") if named.get(k) is not None}
    stops = frozenset(int(i) for i in named.get("end_of_turn", ()))
    stops |= {special["eos"]} if "eos" in special else frozenset()
    texts = _texts(hf)
    size = max([int(store.meta["vocab_size"]), len(texts), *(i + 1 for i in stops)])
    control = {*stops, *special.values(), *_control_ids(hf)}
    return Vocabulary(
        special,
        stops,
        is_stop=_table(size, stops),
        is_control=_table(size, control),
        is_blank=_table(size, (i for i, text in enumerate(texts) if text.isspace())),
        is_newline=_table(size, (i for i, t in enumerate(texts) if t.startswith(("\n", "\r")))),
        hf=hf,
    )


def flags(table: Bools, tokens: npt.NDArray[np.integer[Any]]) -> Bools:
    """Look tokens up; an id outside the table counts as its last entry."""
    return np.take(table, tokens, mode="clip")


def special_texts(hf: Any) -> dict[str, int]:
    """Return the special tokens of a tokenizer and their ids; marks that are mere text are out."""
    found = {str(t): int(i) for i, t in hf.added_tokens_decoder.items() if t.special}
    return found | {t: int(hf.convert_tokens_to_ids(t)) for t in hf.all_special_tokens}


def _control_ids(hf: Any) -> Iterable[int]:
    if hf is None:
        return ()
    return (i for text, i in special_texts(hf).items() if not _MEANT_IN_ANSWERS.search(text))


def _texts(hf: Any) -> list[str]:
    if hf is None:
        return []
    return list(hf.backend_tokenizer.decode_batch([[i] for i in range(len(hf))], False))


def _table(size: int, ids: Iterable[int]) -> Bools:
    table = np.zeros(size, bool)
    table[list(ids)] = True
    return table


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

    @property
    def counts(self) -> dict[str, int]:
        """Samples, turns and tokens of the store."""
        return {
            "samples": len(self.store),
            "turns": int(self.store.turns.offsets[-1]) // _WIDTH,
            "tokens": int(self.store.tokens.lengths.sum(dtype=np.int64)),
        }

    def places(self, samples: Iterable[int]) -> tuple[str, ...]:
        """Return where the first samples come from, each once, as ``file:line``."""
        first = list(dict.fromkeys(samples))[:MAX_EXAMPLES]
        return tuple(self.store.source_line(int(sample)) for sample in first)


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
