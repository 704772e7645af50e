"""Rules that token ids and turn records answer alone; they see every sample of a store.

Each takes a block and returns the sample (from 0 in the block) of each hit, one entry a turn or a
sample. A turn that does not end in a stop token falls under exactly one of three rules: the stop
stands right behind it, something else does, or the sample ends there.
"""

from __future__ import annotations

import numpy as np

from megasft.checks.data.blocks import Block, Bools, Ints
from megasft.checks.data.vocabulary import Vocabulary, flags


def stop_not_trained(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns with a control token right behind them that should have been their last."""
    open_, behind = _without_stop(block, vocabulary)
    control = flags(vocabulary.is_control, _at(block, block.ends))
    return block.sample[open_ & behind & control]


def turn_without_stop(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns that end in ordinary text with ordinary text behind."""
    open_, behind = _without_stop(block, vocabulary)
    control = flags(vocabulary.is_control, _at(block, block.ends))
    return block.sample[open_ & behind & ~control]


def answer_cut(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns that reach the end of their sample without a stop token."""
    open_, behind = _without_stop(block, vocabulary)
    return block.sample[open_ & ~behind]


def stop_inside_turn(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns that hold a control token before the one, or the several, that end them.

    Harmony's turns are several messages: an end right before the header of the turn is none.
    """
    control = flags(vocabulary.is_control, block.tokens)
    is_followed = np.concatenate([control[1:], np.zeros(min(len(control), 1), bool)])
    control = control & ~is_followed & ~_between_messages(block, control)
    inside = block.count_in_turns(control, but_last=True) > 0
    return block.sample[inside & ~block.whole]


def empty_answer(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns of nothing but a stop token and white space."""
    says_nothing = flags(vocabulary.is_blank | vocabulary.is_stop, block.tokens)
    is_empty = block.count_in_turns(says_nothing) == block.ends - block.starts
    return np.asarray(block.sample[is_empty], np.int64)


def leading_newline(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turns whose first trained token begins with a line end."""
    newline = flags(vocabulary.is_newline, _at(block, block.starts))
    return block.sample[newline & ~block.whole]


def mask_all_zero(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return samples without a trained token."""
    return np.flatnonzero(block.labels_of_samples() == 0)


def mask_all_one(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return samples of which everything but the first token is trained."""
    lengths = np.diff(block.offsets)
    labels = block.labels_of_samples()
    return np.flatnonzero((labels > 0) & (labels >= lengths - 1))


def turn_out_of_range(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return turn records that are empty, overlap, or leave their sample."""
    return block.unsound


def token_out_of_range(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return samples that hold an id the vocabulary does not have."""
    outside = (block.tokens < 0) | (block.tokens >= len(vocabulary.is_stop))
    return _samples_at(block, np.flatnonzero(outside))


def bos_twice(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return samples that begin with two bos tokens."""
    bos = vocabulary.special.get("bos", -1)
    has_two = np.flatnonzero(np.diff(block.offsets) >= 2)
    first = block.offsets[has_two]
    return np.asarray(has_two[(block.tokens[first] == bos) & (block.tokens[first + 1] == bos)])


def unknown_token(block: Block, vocabulary: Vocabulary) -> Ints:
    """Return samples that hold the token for text the vocabulary cannot spell."""
    unknown = getattr(vocabulary.hf, "unk_token_id", None)
    if unknown is None or unknown in {*vocabulary.special.values(), *vocabulary.stops}:
        return np.zeros(0, np.int64)
    return _samples_at(block, np.flatnonzero(block.tokens == unknown))


def _without_stop(block: Block, vocabulary: Vocabulary) -> tuple[Bools, Bools]:
    # -> ends without a stop; has a token of its sample behind
    stop = flags(vocabulary.is_stop, block.tokens)
    last_is_stop = stop[block.ends - 1]
    whole_has_stop = block.whole & (block.count_in_turns(stop) > 0)
    return ~last_is_stop & ~whole_has_stop, block.ends < block.offsets[block.sample + 1]


def _between_messages(block: Block, control: Bools) -> Bools:
    """Return bool [T]: control tokens before the two tokens that stand before their turn, too.

    ``<|start|>assistant`` [analysis ``<|end|><|start|>assistant`` final ``<|return|>``]
    """
    between = np.zeros(len(control), bool)
    behind = np.flatnonzero(control[:-2]) + 1
    turn = np.searchsorted(block.starts, behind, "right") - 1
    behind, turn = behind[turn >= 0], turn[turn >= 0]
    start = block.starts[turn]
    repeats = (start >= 2) & (behind + 1 < block.ends[turn])
    for i in (0, 1):
        repeats &= block.tokens[behind + i] == block.tokens[start - 2 + i]
    between[behind[repeats]] = between[behind[repeats] - 1] = True
    return between


def _at(block: Block, positions: Ints) -> Ints:
    # Behind the block's last token stands none; callers look at the sample's end themselves.
    if not len(block.tokens):
        return np.zeros(0, np.int64)
    return block.tokens[np.minimum(positions, len(block.tokens) - 1)].astype(np.int64)


def _samples_at(block: Block, positions: Ints) -> Ints:
    return np.unique(np.searchsorted(block.offsets, positions, "right") - 1)
