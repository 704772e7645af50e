"""What becomes of a conversation that is longer than a row may be.

    truncate-turns   cut behind the last turn that fits; dropped when none does (the default)
    drop             left out
    truncate         cut at the limit, wherever that is: the last answer may lose its end
    error            a bad record: no store is made without --skip-bad

A prompt or an answer can have a limit of its own: the prompt is what stands before a turn and
behind the turn before, the answer is the turn. A conversation is too long from the first one on
that exceeds its limit.

Nothing of it is silent: samples, tokens and trained tokens that were lost are counted by reason in
store.json, and what was dropped is listed beside the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from megasft.schema import TURN_FIELDS, Sample

TOO_LONG: Final = ("truncate-turns", "drop", "truncate", "error")
_START, _TOKENS = TURN_FIELDS.index("start"), TURN_FIELDS.index("num_tokens")


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a sample may be.

    Attributes:
        max_tokens: Tokens; 0 for no limit.
        policy: One of ``TOO_LONG``.
        max_prompt_tokens: Tokens of a prompt; 0 for no limit.
        max_answer_tokens: Tokens of an answer; 0 for no limit.
    """

    max_tokens: int = 0
    policy: str = "truncate-turns"
    max_prompt_tokens: int = 0
    max_answer_tokens: int = 0

    def exceeded_by(self, sample: Sample) -> bool:
        """Return whether a sample is too long."""
        return self.room(sample) < len(sample.tokens)

    def room(self, sample: Sample) -> int:
        """Return how many tokens of a sample are within all limits."""
        room = self.max_tokens or len(sample.tokens)
        if self.max_prompt_tokens or self.max_answer_tokens:
            starts = sample.turns[:, _START]
            ends = starts + sample.turns[:, _TOKENS]
            before = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
            if self.max_prompt_tokens:
                room = min([room, *before[starts - before > self.max_prompt_tokens][:1].tolist()])
            if self.max_answer_tokens:
                limits = starts + self.max_answer_tokens
                room = min([room, *limits[limits < ends][:1].tolist()])
        return room


class Cut(NamedTuple):
    """What is left of a sample that was too long.

    Attributes:
        sample: None when nothing to train is left.
        lost_tokens: Tokens that were cut off, or all of them.
        lost_labels: Trained tokens among them.
        is_mid_turn: The last turn lost its end.
    """

    sample: Sample | None
    lost_tokens: int
    lost_labels: int
    is_mid_turn: bool = False


def shorten(sample: Sample, limit: Limit) -> Cut:
    """Return what the policy leaves of a sample that is too long.

    Args:
        sample: Too long.
        limit: Its policy is not ``error``.
    """
    turns, room = sample.turns, limit.room(sample)
    ends = turns[:, _START] + turns[:, _TOKENS]
    kept, size = turns[:0], room
    if limit.policy == "truncate-turns":
        kept = turns[: int(np.searchsorted(ends, room, "right"))]
        size = int(ends[len(kept) - 1]) if len(kept) else 0
    elif limit.policy == "truncate":
        kept = turns[turns[:, _START] < room].copy()
        kept[:, _TOKENS] = np.minimum(kept[:, _TOKENS], room - kept[:, _START])
    num_labels = int(turns[:, _TOKENS].sum())
    if not len(kept):
        return Cut(None, len(sample.tokens), num_labels)
    left = int(kept[:, _TOKENS].sum())
    is_mid_turn = bool(ends[len(kept) - 1] > size)
    return Cut(
        Sample(sample.tokens[:size], kept),
        len(sample.tokens) - size,
        num_labels - left,
        is_mid_turn,
    )
