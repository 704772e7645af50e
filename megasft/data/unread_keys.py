"""Keys that stand in the records and that nobody reads: how often, where first, and what they mean.

Ids and scores are no fault. A key that sounds like a label, a prompt or a picture is one, since
whoever wrote it believes that it does something.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

OF_RECORD, OF_MESSAGE = "record", "message"
_WORDS: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_MEANT: Final = {
    *("label", "labels", "loss", "mask", "masks", "masked", "weight", "weights", "train"),
    *("trained", "training", "trainable", "supervised", "learn", "target", "targets"),
    *("prompt", "prompts", "system", "instruction", "instructions", "query", "question"),
    *("input", "inputs", "context", "history"),
    *("image", "images", "audio", "audios", "video", "videos", "media", "picture", "pictures"),
}
_ABOUT: Final = {
    *("id", "ids", "uid", "uuid", "hash", "type", "kind", "source", "name", "index", "idx"),
    *("len", "length", "num", "count", "tokens", "score", "url", "lang", "language", "model"),
}
"""What `prompt_id` or `num_tokens` say about a text is no text."""


class UnreadKey(NamedTuple):
    """A key and where it stands: in a record or in a message."""

    place: str
    key: str

    @property
    def shown(self) -> str:
        """The key as a user is shown it."""
        return f"`{self.key}` of a {self.place}"


class Seen(NamedTuple):
    """How many records hold an unread key, and the first, as ``file:line``."""

    num_records: int
    first: str


def sounds_meant(key: str) -> bool:
    """Say whether a key sounds like a label, a prompt, or a picture and its like.

    Example:
        >>> [sounds_meant(key) for key in ("loss_mask", "promptText", "prompt_id", "score")]
        [True, True, False, False]
    """
    words = {word.lower() for word in _WORDS.findall(key)}
    return bool(words & _MEANT) and not words & _ABOUT


def count(seen: dict[UnreadKey, Seen], keys: tuple[UnreadKey, ...], place: str) -> None:
    """Count the keys of one more record."""
    for key in keys:
        old = seen.get(key)
        seen[key] = Seen(old.num_records + 1, old.first) if old else Seen(1, place)


def as_meta(seen: dict[UnreadKey, Seen]) -> list[dict[str, Any]]:
    """Return what store.json keeps of them, the most frequent first."""
    ordered = sorted(seen.items(), key=lambda item: (-item[1].num_records, item[0]))
    return [{**key._asdict(), **found._asdict()} for key, found in ordered]


def lines_of(meta: list[dict[str, Any]]) -> list[str]:
    """Return one line a key for a terminal, from what store.json keeps."""
    lines = []
    for item in meta:
        num, key = item["num_records"], UnreadKey(item["place"], item["key"])
        records = "1 record" if num == 1 else f"{num:,} records"
        lines.append(f"{key.shown}: in {records}, first at {item['first']}")
    return lines
