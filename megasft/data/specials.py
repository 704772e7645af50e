"""Special tokens that an author wrote as text: found, refused, kept, or escaped.

A text about chat formats holds ``<|im_end|>``, and a tokenizer makes a control token of it: the
model would see, or learn to say, the end of a turn in the middle of one. Escaping leaves the text
as it is and takes away its power. The template's own special tokens are put into the render under
private names, as long as the real ones so that no position moves, and the render is encoded with a
copy of the tokenizer that knows the special tokens by their private names alone. So what the author
wrote is encoded as any other text, by the same pre-tokenizer and merges, in one piece. Texts that a
template takes apart (schemas of tools, arguments of calls) are shielded: they bear other private
names through the template, and are themselves again behind it. Rejected:
cutting the render at the special tokens and encoding the pieces, which tokenizers that mark the
beginning of a text (SentencePiece's) encode differently; breaking the text with an invisible
character, which the model would learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from megasft.data.conversation import BadRecordError

POLICIES: Final = ("escape", "reject", "keep")
_FIRST_PRIVATE: Final = 0x100000  # Supplementary Private Use Area-B: no meaning, no normalization
_FIRST_SHIELD: Final = _FIRST_PRIVATE + 0x8000
_NUM_PRIVATE: Final = 0x7FFD


class SpecialTokens:
    """The special tokens of a tokenizer, and what becomes of them in a text.

    Args:
        tokens: All of them, as text.
        policy: One of ``POLICIES``.
    """

    def __init__(self, tokens: Iterable[str], policy: str) -> None:
        ordered = sorted(tokens, key=lambda token: (-len(token), token))  # the longest match wins
        self.policy = policy
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._beginnings = sorted({token[:2] for token in ordered})
        self.private = {
            token: chr(_FIRST_PRIVATE + i % _NUM_PRIVATE) * len(token)
            for i, token in enumerate(ordered)
        }
        self._shields = {
            token: chr(_FIRST_SHIELD + i % _NUM_PRIVATE) * len(token)
            for i, token in enumerate(ordered)
        }
        self._shielded = {shield: token for token, shield in self._shields.items()}
        self._shield_pattern = re.compile("|".join(self._shielded) or "(?!)")

    def find(self, text: str) -> str | None:
        """Return a special token that stands in a text."""
        for beginning in self._beginnings:  # some 20 times faster than the pattern
            if beginning in text:
                found = self._pattern.search(text)
                return found[0] if found else None
        return None

    def hide(self, text: str) -> str:
        """Return a text of the template with its special tokens under their private names."""
        return self._pattern.sub(lambda found: self.private[found[0]], text)

    def reveal(self, text: str) -> str:
        """Return a text with what was shielded in it as the author wrote it."""
        return self._shield_pattern.sub(lambda found: self._shielded[found[0]], text)

    def shield(self, value: Any) -> Any:
        """Return fields of a record with shields in the place of special tokens in their texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._shields[found[0]], value)
        if isinstance(value, Mapping):
            return {self.shield(key): self.shield(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.shield(item) for item in value)
        return value

    def refuse(self, token: str, why: str) -> BadRecordError:
        """Return the error for a text that holds a special token."""
        return BadRecordError(
            "special token in the text",
            f"the text holds {token!r}, which would become a control token {why}",
        )

    def rename(self, tokenizer_json: str) -> str:
        """Return a tokenizer.json that knows the special tokens by their private names alone."""
        tokenizer = json.loads(tokenizer_json)
        for added in tokenizer.get("added_tokens") or []:
            added["content"] = self.private.get(added["content"], added["content"])
        model = tokenizer["model"]
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {self.private.get(text, text): i for text, i in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[self.private.get(text, text), score] for text, score in vocab]
        if model.get("unk_token") in self.private:
            model["unk_token"] = self.private[model["unk_token"]]
        tokenizer["post_processor"] = None  # it names special tokens, and adds what we do not want
        return json.dumps(tokenizer, ensure_ascii=False)


def special_texts(added_tokens: Iterable[Any], named: Mapping[str, Any]) -> set[str]:
    """Return the special tokens among a tokenizer's added ones, and those it names."""
    special = {str(token) for token in added_tokens if token.special}
    for value in named.values():
        special.update(str(v) for v in (value if isinstance(value, list) else [value]))
    return special
