"""Renders to token ids, and which of them lie in a span: Hugging Face's tokenizers, or gigatoken.

gigatoken encodes byte-level BPE some fifty times faster, with the same ids. It tells no offsets;
for byte-level BPE the cumulated byte lengths of the tokens are the offsets, in bytes. It is trusted
as far as it is checked: on texts made to trip tokenizers and on the first renders of each worker,
then on a sample of all, always against the tokenizers library. One differing id ends the build,
which begins again without gigatoken and says so. A text whose tokens do not add up to its bytes (a
normalizer changed it) is encoded by the tokenizers library, too.

Only "fast" tokenizers know offsets. Byte-level post-processors trim the blanks from offsets, so the
post-processor is taken off (special tokens come from the template alone), as are truncation and
padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol

import gigatoken
import numpy as np
import numpy.typing as npt

from megasft.data.conversation import UnfaithfulError
from megasft.data.turn_bounds import Span
from megasft.errors import DataError

ENCODERS: Final = ("auto", "tokenizers")
_CHECKED_FIRST: Final = 64
_TRAPS: Final = (
    "  leading  and   trailing   ",
    "\n\n\n\r\n\t x\u00a0y\u3000z\u200b",
    "don't you'll WE'RE I'd 'twas",
    "1234567890 3.14159 1,000,000 0x7f 12³",
    "def f(x):\n        return {'a': [1, 2]}  # comment\n",
    "中文和日本語、한국어 ภาษาไทย العربية हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u1e9b\u0323 ﬁ ½",
    "<think>\n\n</think>\n\n<tool_call>{}</tool_call> < | > <| |>",
    "a" * 300 + " " * 70 + "=" * 80,
)


class Encoded(NamedTuple):
    """Token ids of several texts, end to end, and the bytes each covers; bounds ascend.

    Attributes:
        ids: int32 [L].
        starts: int64 [L]. First byte of each token, counted in the UTF-8 of all texts joined.
        ends: int64 [L]. Behind its last one.
        borders: int64 [B + 1]. First token of each text.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    borders: npt.NDArray[np.int64]


class Encoder(Protocol):
    """What encodes renders."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the tokens of some texts; special tokens in them become control tokens."""
        ...

    def check(self, texts: Sequence[str]) -> None:
        """Compare the ids of some texts with the reference's."""
        ...


class HuggingFaceEncoder:
    """Encodes with the tokenizers library.

    Args:
        backend: A ``tokenizers.Tokenizer``; it loses its post-processor.
        place: What errors call it.
    """

    def __init__(self, backend: Any, place: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        self._backend, self._place = backend, place

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the tokens of some texts; special tokens in them become control tokens."""
        items = self._backend.encode_batch(list(texts), add_special_tokens=False)
        bounds = [np.asarray(item.offsets, dtype=np.int64).reshape(-1, 2) for item in items]
        if any((np.diff(own, axis=0) < 0).any() for own in bounds):
            raise DataError(
                f"{self._place}: the offsets of this tokenizer do not ascend, so answers cannot "
                "be found in its tokens; use another conversion of it"
            )
        borders = _borders(len(own) for own in bounds)
        firsts = np.repeat(_borders(map(len, texts))[:-1], np.diff(borders))
        covered = _byte_of_character(
            "".join(texts), _joined(bounds).reshape(-1, 2) + firsts[:, None]
        )
        ids = [np.asarray(item.ids, dtype=np.int32) for item in items]
        return Encoded(_joined(ids, np.int32), covered[:, 0], covered[:, 1], borders)

    def check(self, texts: Sequence[str]) -> None:
        """Do nothing: this is the reference."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text alone."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]


class GigatokenEncoder:
    """Encodes byte-level BPE with gigatoken.

    Args:
        fast: A ``gigatoken.Tokenizer``.
        reference: The same tokenizer in the tokenizers library.

    Raises:
        UnfaithfulError: It differs on texts made to trip tokenizers.
    """

    def __init__(self, fast: Any, reference: HuggingFaceEncoder) -> None:
        self._fast, self._reference = fast, reference
        lengths = {number: len(token) for number, token in fast.vocab.items()}
        self._lengths = np.zeros(max(lengths) + 1, np.int64)
        self._lengths[list(lengths)] = list(lengths.values())
        self._num_checked = 0
        self.check(_TRAPS)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the tokens of some texts; special tokens in them become control tokens."""
        if self._num_checked < _CHECKED_FIRST:
            self.check(texts[:_CHECKED_FIRST])
        encoded = [text.encode() for text in texts]
        found = [self._fast.encode(data) for data in encoded]
        ids = _joined(found, np.int32)
        borders = _borders(map(len, found))
        ends = np.cumsum(self._lengths[ids])
        wanted = _borders(map(len, encoded))
        reached = np.concatenate([_ZERO, ends])[borders]
        if not np.array_equal(reached, wanted):
            return self._without_changed(texts, np.diff(reached) != np.diff(wanted))
        return Encoded(ids, np.concatenate([_ZERO, ends[:-1]])[: len(ends)], ends, borders)

    def _without_changed(self, texts: Sequence[str], is_changed: npt.NDArray[np.bool_]) -> Encoded:
        """Encode texts of which a normalizer changes some, those with the reference."""
        parts, base = [], 0
        for text, changed in zip(texts, is_changed.tolist(), strict=True):
            part = (self._reference if changed else self).encode([text])
            parts.append(part._replace(starts=part.starts + base, ends=part.ends + base))
            base += len(text.encode())
        return Encoded(
            _joined([part.ids for part in parts], np.int32),
            _joined([part.starts for part in parts]),
            _joined([part.ends for part in parts]),
            _borders(len(part.ids) for part in parts),
        )

    def check(self, texts: Sequence[str]) -> None:
        """Compare the ids of some texts with the reference's.

        Raises:
            UnfaithfulError: They differ.
        """
        for text, wanted in zip(texts, self._reference.ids(texts), strict=True):
            self._num_checked += 1
            if self._fast.encode(text.encode()).tolist() != wanted:
                raise UnfaithfulError("encode", f"gigatoken's ids of {text[:60]!r} differ")


_ZERO: Final = np.zeros(1, np.int64)


def make_encoder(tokenizer_json: str, reference: HuggingFaceEncoder, wanted: str) -> Encoder:
    """Return the fastest encoder that has the reference's ids.

    Args:
        tokenizer_json: The tokenizer.
        reference: The same one.
        wanted: One of ``ENCODERS``; ``auto`` tries gigatoken.

    Raises:
        UnfaithfulError: gigatoken takes the tokenizer and encodes otherwise.
    """
    if wanted != "auto" or not _is_byte_level(tokenizer_json):
        return reference
    try:
        fast = gigatoken.Tokenizer.from_json(tokenizer_json)
        return GigatokenEncoder(fast, reference)
    except UnfaithfulError:
        raise
    except Exception:  # whatever it says of a tokenizer it does not know: the reference does
        return reference


def _is_byte_level(tokenizer_json: str) -> bool:
    return '"ByteLevel"' in tokenizer_json and '"type":"BPE"' in tokenizer_json.replace(" ", "")


class Turns(NamedTuple):
    """Trained tokens of the spans of several texts, in order.

    Attributes:
        text: int64 [N]. The text of each span.
        first: int64 [N]. Its first trained token, in its text; never the first one there.
        last: int64 [N]. Behind its last trained token.
        num_border_tokens: int64 [B]. Tokens of each text that lie half in a span; not trained.
    """

    text: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    num_border_tokens: npt.NDArray[np.int64]


def trained_tokens(
    encoded: Encoded, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> Turns:
    """Return the tokens that lie wholly in each span.

    Args:
        encoded: The texts' tokens.
        texts: Renders.
        spans: Of each text; ascending.

    Example:
        Tokens ``Hi|!|<e>|?`` start at [0, 2, 3, 6]; the span (0, 6, "<e>") holds tokens 1 and 2.
    """
    flat = [span for own in spans for span in own]
    text = np.repeat(np.arange(len(texts)), [len(own) for own in spans])
    edges = np.asarray([(span.start, span.end) for span in flat], np.int64).reshape(-1, 2)
    edges += _borders(map(len, texts))[text][:, None]
    edges = _byte_of_character("".join(texts), edges)
    starts, ends = edges[:, 0], edges[:, 1]
    has_stop = np.asarray([span.stop is not None for span in flat], np.bool_)
    first = np.searchsorted(encoded.starts, starts, "left")
    # A stop token with `rstrip` swallows the blanks behind it and ends outside the span.
    last = np.searchsorted(encoded.starts, ends, "left")
    last[~has_stop] = np.searchsorted(encoded.ends, ends[~has_stop], "right")
    origin = encoded.borders[text]
    borders = np.concatenate([starts, ends[~has_stop]])
    begun = np.searchsorted(encoded.starts, borders, "left")
    ended = np.searchsorted(encoded.ends, borders, "right")
    straddling = np.zeros(len(texts), np.int64)
    np.add.at(straddling, np.concatenate([text, text[~has_stop]]), np.maximum(begun - ended, 0))
    return Turns(text, np.maximum(first - origin, 1), last - origin, straddling)


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: Any = np.int64) -> npt.NDArray[Any]:
    return (
        np.concatenate(arrays, dtype=dtype, casting="same_kind")
        if len(arrays)
        else np.zeros(0, dtype)
    )


def _borders(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    # 3, 2 -> [0, 3, 5]
    return np.asarray([0, *accumulate(lengths)], np.int64)


def _byte_of_character(text: str, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return positions in a text as positions in its UTF-8."""
    if text.isascii():
        return positions
    data = np.frombuffer(text.encode(), np.uint8)
    first_bytes = np.flatnonzero((data & 0xC0) != 0x80)
    is_end = positions == len(first_bytes)
    return np.where(is_end, len(data), first_bytes[np.where(is_end, 0, positions)])
