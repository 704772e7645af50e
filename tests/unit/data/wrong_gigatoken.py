"""A gigatoken that encodes one word otherwise."""

from typing import Any


class Wrong:
    """Any text with a zebra has its ids backwards."""

    def __init__(self, right: Any) -> None:
        self._right, self.vocab = right, right.vocab

    def encode(self, data: bytes) -> Any:
        ids = self._right.encode(data)
        return ids[::-1] if b"zebra" in data else ids
