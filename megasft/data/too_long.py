"""What becomes of a conversation that is longer than a row may be.

    truncate-turns   cut behind the last turn that fits; dropped when none does (the default)
    drop             left out
    truncate         cut at the limit, wherever that is: the last answer may lose its end
    error            a bad record: no store is made without --skip-bad

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
    """

    max_tokens: int = 0
    policy: str = "truncate-turns"

    def exceeded_by(self, sample: Sample) -> bool:
        """Return whether a sample is too long."""
        return 0 < self.max_tokens < len(sample.tokens)


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
        sample: Longer than ``limit.max_tokens``.
        limit: Its policy is not ``error``.
    """
    turns, room = sample.turns, limit.max_tokens
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
