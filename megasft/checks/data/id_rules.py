"""Rules that token ids and turn records answer alone; they see every sample of a store.

Each takes a block and returns the sample (from 0 in the block) of each hit, one entry a turn or a
sample. A turn that does not end in a stop token falls under exactly one of three rules: the stop
stands right behind it, something else does, or the sample ends there.
"""

from __future__ import annotations

import numpy as np

from megasft.checks.data.subject import Block, Bools, Ints, Needs, Vocabulary, flags
from megasft.checks.engine import Severity, rule


@rule("stop-not-trained", Severity.ERROR, Needs.IDS, unit="turns")
def stop_not_trained(block: Block, vocabulary: Vocabulary) -> Ints:
    """A control token ends the answer but is not trained: the model does not learn to stop.

    Remedy: build the store again with megasft build, which trains it; or, in a template of your
    own, put the stop token inside {% generation %}
    """
    open_, behind = _without_stop(block, vocabulary)
    control = flags(vocabulary.is_control, _at(block, block.ends))
    return block.sample[open_ & behind & control]


@rule("mask-all-zero", Severity.ERROR, Needs.IDS, unit="samples")
def mask_all_zero(block: Block, vocabulary: Vocabulary) -> Ints:
    """Nothing of the sample is trained: it costs time and teaches nothing.

    Remedy: label at least one assistant message 1, or leave the record out
    """
    return np.flatnonzero(block.labels_of_samples() == 0)


@rule("mask-all-one", Severity.ERROR, Needs.IDS, unit="samples")
def mask_all_one(block: Block, vocabulary: Vocabulary) -> Ints:
    """Everything is trained, the prompt too.

    Remedy: build with --train-on all-turns; if everything is meant, --ignore mask-all-one
    """
    lengths = np.diff(block.offsets)
    labels = block.labels_of_samples()
    return np.flatnonzero((labels > 0) & (labels >= lengths - 1))


@rule("turn-out-of-range", Severity.ERROR, Needs.IDS, unit="turns")
def turn_out_of_range(block: Block, vocabulary: Vocabulary) -> Ints:
    """A turn record is empty, overlaps the one before, or leaves its sample.

    Remedy: the program that wrote the store is wrong; build it with megasft build
    """
    return block.unsound


@rule("token-out-of-range", Severity.ERROR, Needs.IDS, unit="samples")
def token_out_of_range(block: Block, vocabulary: Vocabulary) -> Ints:
    """A token id is negative or not in the vocabulary.

    Remedy: build the store with the tokenizer of the model
    """
    outside = (block.tokens < 0) | (block.tokens >= len(vocabulary.is_stop))
    return _samples_at(block, np.flatnonzero(outside))


@rule("stop-inside-turn", Severity.ERROR, Needs.IDS, unit="turns")
def stop_inside_turn(block: Block, vocabulary: Vocabulary) -> Ints:
    """A control token stands inside the answer: the model learns to stop and go on.

    Harmony's turns are several messages: an end right before the header of the turn is none.


    Remedy: build with --special-tokens-in-text escape, or edit the text
    """
    control = flags(vocabulary.is_control, block.tokens)
    is_followed = np.concatenate([control[1:], np.zeros(min(len(control), 1), bool)])
    control = control & ~is_followed & ~_between_messages(block, control)
    inside = block.count_in_turns(control, but_last=True) > 0
    return block.sample[inside & ~block.whole]


@rule("empty-answer", Severity.WARNING, Needs.IDS, unit="turns")
def empty_answer(block: Block, vocabulary: Vocabulary) -> Ints:
    """The answer is nothing but white space and a stop token: the model learns to say nothing.

    Remedy: remove the record, or label the message 0
    """
    says_nothing = flags(vocabulary.is_blank | vocabulary.is_stop, block.tokens)
    is_empty = block.count_in_turns(says_nothing) == block.ends - block.starts
    return np.asarray(block.sample[is_empty], np.int64)


@rule("answer-cut", Severity.WARNING, Needs.IDS, unit="turns")
def answer_cut(block: Block, vocabulary: Vocabulary) -> Ints:
    """The sample ends inside the answer, without a stop token.

    Remedy: build with --too-long truncate-turns and a larger --max-tokens; if the template ends its
    last turn without a stop token, use another (--chat-template FILE)
    """
    open_, behind = _without_stop(block, vocabulary)
    return block.sample[open_ & ~behind]


@rule("turn-without-stop", Severity.WARNING, Needs.IDS, unit="turns")
def turn_without_stop(block: Block, vocabulary: Vocabulary) -> Ints:
    """The answer ends without a stop token and ordinary text follows.

    Remedy: use a chat template that ends each turn with a special token (--chat-template FILE)
    """
    open_, behind = _without_stop(block, vocabulary)
    control = flags(vocabulary.is_control, _at(block, block.ends))
    return block.sample[open_ & behind & ~control]


@rule("leading-newline", Severity.WARNING, Needs.IDS, Needs.TOKENIZER, unit="turns")
def leading_newline(block: Block, vocabulary: Vocabulary) -> Ints:
    """The answer begins with a line end: the model learns to print one first.

    Remedy: strip the answers
    """
    newline = flags(vocabulary.is_newline, _at(block, block.starts))
    return block.sample[newline & ~block.whole]


@rule("bos-twice", Severity.WARNING, Needs.IDS, unit="samples")
def bos_twice(block: Block, vocabulary: Vocabulary) -> Ints:
    """The sample begins with two bos tokens: both the template and something else added one.

    Remedy: remove bos_token from the chat template or from the text
    """
    bos = vocabulary.special.get("bos", -1)
    has_two = np.flatnonzero(np.diff(block.offsets) >= 2)
    first = block.offsets[has_two]
    return np.asarray(has_two[(block.tokens[first] == bos) & (block.tokens[first + 1] == bos)])


@rule("unknown-token", Severity.WARNING, Needs.IDS, Needs.TOKENIZER, unit="samples")
def unknown_token(block: Block, vocabulary: Vocabulary) -> Ints:
    """The vocabulary cannot spell part of the text: the unknown token stands for it.

    Remedy: remove the characters, or use a tokenizer with byte fallback
    """
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
