"""From the bytes of a record to token ids and turn records.

The whole render is encoded once, with character offsets; cutting it where an answer starts would
change the ids at the seam. A token is trained if it lies wholly inside a span. One that begins
before the answer (a header that glues to it, such as ``Assistant: Yes``) belongs to the prompt: at
inference the prompt ends there. Such border tokens are counted and shown, since a template that
makes them hides the first token of each answer from training.

Only "fast" tokenizers know offsets. They are used through the ``tokenizers`` backend: byte-level
post-processors trim the blanks from offsets, so the post-processor is taken off (special tokens
come from the template alone), as are truncation and padding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.data.conversation import BadRecordError, Category, Conversation
from megasft.data.formats import FieldMap, parse
from megasft.data.render import TEMPLATE_DATE, Rendered, Renderer, Span
from megasft.errors import DataError
from megasft.schema import NO_CATEGORY, Sample

TOKENIZER_FILE: Final = "tokenizer.json"
_AUTO: Final = FieldMap()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides which sample a record becomes.

    Attributes:
        tokenizer: Folder of the tokenizer.
        fields: Where in a record the messages are.
        keep_special_tokens: Let special tokens in the text become control tokens.
    """

    tokenizer: Path
    fields: FieldMap = _AUTO
    keep_special_tokens: bool = False


class Made(NamedTuple):
    """A record that became a sample.

    Attributes:
        line: Its line or record number.
        sample: Category ids are still 0: names become ids in input order, in one place.
        category: What the record says about its category.
        stop_ids: The token that ends each turn; fewer than turns if some end without one.
        num_border_tokens: Tokens half inside a span, which are not trained.
    """

    line: int
    sample: Sample
    category: Category
    stop_ids: tuple[int, ...]
    num_border_tokens: int


class Rejected(NamedTuple):
    """A record that did not, and why."""

    line: int
    reason: str
    detail: str


class Encoded(NamedTuple):
    """Token ids of a render and the characters each covers; both bounds ascend.

    Attributes:
        ids: int32 [L].
        starts: int64 [L]. First character of each token.
        ends: int64 [L]. Behind its last character.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class Tokenizer:
    """Turns records into samples with one recipe; loaded once in each worker.

    Raises:
        DataError: The folder holds no fast tokenizer with a chat template.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.hf = load_tokenizer(recipe.tokenizer)
        special = {str(t) for t in self.hf.added_tokens_decoder.values() if t.special}
        special |= set(self.hf.all_special_tokens)
        self._special_text = re.compile("|".join(map(re.escape, sorted(special))) or "(?!)")
        bos, eos = self.hf.bos_token, self.hf.eos_token
        self._stops = special - ({bos} if bos != eos else set())
        self._renderers: dict[str, Renderer] = {}
        self._backend = self.hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None

    def make(self, records: Iterable[tuple[int, bytes]]) -> list[Made | Rejected]:
        """Make samples of some records; one outcome each, in order."""
        rendered: list[tuple[int, Conversation, Rendered] | Rejected] = []
        for line, data in records:
            try:
                conversation = parse(data, self._recipe.fields)
                rendered.append((line, conversation, self.render(conversation)))
            except BadRecordError as error:
                rendered.append(Rejected(line, error.reason, error.detail))
        good = [item for item in rendered if not isinstance(item, Rejected)]
        encoded = iter(self._encode([text for _, _, (text, _) in good]))
        return [
            item if isinstance(item, Rejected) else self._finish(*item, next(encoded))
            for item in rendered
        ]

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation, refusing special tokens its author wrote as text."""
        if not self._recipe.keep_special_tokens:
            for text in _texts(conversation):
                if found := self._special_text.search(text):
                    raise BadRecordError(
                        "special token in the text",
                        f"the text holds {found[0]!r}, which would become a control token "
                        "(--special-tokens-in-text keep allows it)",
                    )
        template = self.hf.get_chat_template(tools=conversation.tools)
        if template not in self._renderers:
            self._renderers[template] = Renderer(
                template, special_tokens=self.hf.special_tokens_map, stops=self._stops
            )
        return self._renderers[template].render(conversation)

    def facts(self) -> dict[str, Any]:
        """Return what store.json keeps of the tokenizer."""
        file = self._recipe.tokenizer / TOKENIZER_FILE
        data = file.read_bytes() if file.is_file() else self._backend.to_str().encode()
        template = self.hf.get_chat_template()
        facts = {
            "path": str(self._recipe.tokenizer.resolve()),
            "class": type(self.hf).__name__,
            "sha256": hashlib.sha256(data).hexdigest(),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        }
        if "strftime_now" in template:
            facts["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
        return facts

    def _encode(self, texts: list[str]) -> Iterator[Encoded]:
        for item in self._backend.encode_batch(texts, add_special_tokens=False):
            bounds = np.asarray(item.offsets, dtype=np.int64).reshape(-1, 2)
            if (np.diff(bounds, axis=0) < 0).any():
                raise DataError(
                    f"{self._recipe.tokenizer}: the offsets of this tokenizer do not ascend, so "
                    "answers cannot be found in its tokens; use another conversion of it"
                )
            yield Encoded(np.asarray(item.ids, dtype=np.int32), bounds[:, 0], bounds[:, 1])

    def _finish(
        self, line: int, conversation: Conversation, rendered: Rendered, encoded: Encoded
    ) -> Made | Rejected:
        turns, stop_ids, num_border_tokens = [], [], 0
        for span in rendered.spans:
            first, last = trained_tokens(encoded, span)
            if first >= last:
                return Rejected(
                    line, "turn without tokens", f"message {span.message} has no token to train"
                )
            if span.stop is not None:
                stop_ids.append(int(encoded.ids[last - 1]))
                if stop_ids[-1] != self._backend.token_to_id(span.stop):
                    return Rejected(
                        line,
                        "the template changed the message",
                        f"message {span.message} should end in the token {span.stop!r}",
                    )
            turns.append((first, last - first, NO_CATEGORY, span.message))
            num_border_tokens += _num_border_tokens(encoded, span)
        sample = Sample(encoded.ids, np.asarray(turns, dtype=np.int32))
        return Made(line, sample, conversation.category, tuple(stop_ids), num_border_tokens)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer folder, offline.

    Raises:
        DataError: It is missing, not a fast tokenizer, or has no chat template.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --tokenizer takes a downloaded model folder")
    from transformers import AutoTokenizer  # seconds to import: only when a tokenizer is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no tokenizer that can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise DataError(
            f"{folder}: {type(tokenizer).__name__} knows no character offsets, which a fast "
            f"tokenizer ({TOKENIZER_FILE}) does; convert it first"
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; put one into chat_template.jinja there"
        )
    return tokenizer


def trained_tokens(encoded: Encoded, span: Span) -> tuple[int, int]:
    """Return first and one-behind-last token of a span; the first token of a sample never counts.

    Example:
        Tokens ``Hi|!|<e>|?`` start at [0, 2, 3, 6]; the span (0, 6, "<e>") holds tokens 1 and 2.
    """
    first = int(np.searchsorted(encoded.starts, span.start, "left"))
    if span.stop is None:
        last = int(np.searchsorted(encoded.ends, span.end, "right"))
    else:  # a stop token with `rstrip` swallows the blanks behind it and ends outside the span
        last = int(np.searchsorted(encoded.starts, span.end, "left"))
    return max(first, 1), last


def _num_border_tokens(encoded: Encoded, span: Span) -> int:
    borders = [span.start] if span.stop is not None else [span.start, span.end]
    return sum(int(((encoded.starts < b) & (encoded.ends > b)).sum()) for b in borders)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Conversation):
        yield from _texts(value.tools)
        for message in value.messages:
            yield from _texts(message.content)
            yield from _texts(message.extra)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
