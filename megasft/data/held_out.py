"""Which conversations are held out for validation, and a build that makes both stores.

Whether a conversation is held out is decided by a hash of what it says, so it stays where it is
when data is added, moved or shuffled, and its repeats go where it goes. The share is exact only on
average. Both stores are made, or neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

from megasft.data import exact_json
from megasft.data.conversation import Conversation, Message
from megasft.errors import DataError

_KEYS: Final = 2**64


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two parts of the conversations.

    Attributes:
        fraction: Share of all that is held out, in (0, 1).
        held_out: Whether this is the part that is.
    """

    fraction: float
    held_out: bool

    def holds(self, conversation: Conversation) -> bool:
        """Say whether a conversation belongs to this part."""
        return (key_of(conversation) < self.fraction * _KEYS) == self.held_out


def key_of(conversation: Conversation) -> int:
    """Return 64 bits of what a conversation says, blanks at the ends of its texts left out."""
    messages = [_normal(message) for message in conversation.messages]
    data = exact_json.dump([messages, conversation.tools], sort_keys=True)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def valid_output(output: Path) -> Path:
    """Return where the store of what is held out is made, beside the other one."""
    return output.with_name(f"{output.name}-valid")


class Both[T](NamedTuple):
    """What came out of both builds."""

    train: T
    valid: T


def build_both[T](
    build_train: Callable[[], T], build_valid: Callable[[], T], valid_store: Path
) -> Both[T]:
    """Make the store of what is held out, and then the other one; neither if either fails.

    Raises:
        DataError: One of them cannot be made.
    """
    try:
        valid = build_valid()
    except DataError as error:
        raise DataError(f"{valid_store} (held out for validation): {error}") from None
    try:
        return Both(build_train(), valid)
    except BaseException:
        shutil.rmtree(valid_store)
        raise


def _normal(message: Message) -> list[object]:
    return [message.role, (message.content or "").strip(), dict(message.extra)]
