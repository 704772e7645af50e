"""A store in blocks of samples, as flat arrays, so that rules need no loop over samples.

A block holds some four million tokens whatever the store's size: memory stays flat, and one pass
runs at the speed of numpy. Turn records that point outside their sample (a store that another
program wrote) are kept apart, so that one bad record is one finding and breaks no other rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.schema import TURN_FIELDS
from megasft.store import SequenceFile, TokenStore

BLOCK_TOKENS: Final = 4 * 2**20
_WIDTH: Final = len(TURN_FIELDS)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


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
