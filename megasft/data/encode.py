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

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megasft.compat import has
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
    """Token ids of a render and what each covers; both bounds ascend.

    Attributes:
        ids: int32 [L].
        starts: int64 [L]. First character (or byte) of each token.
        ends: int64 [L]. Behind its last one.
        in_bytes: Whether bounds count bytes of UTF-8 instead of characters.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    in_bytes: bool = False


class Encoder(Protocol):
    """What encodes renders."""

    name: str

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the tokens of each text; special tokens in it become control tokens."""
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
        self.name = "tokenizers"

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the tokens of each text, with bounds in characters."""
        for item in self._backend.encode_batch(list(texts), add_special_tokens=False):
            bounds = np.asarray(item.offsets, dtype=np.int64).reshape(-1, 2)
            if (np.diff(bounds, axis=0) < 0).any():
                raise DataError(
                    f"{self._place}: the offsets of this tokenizer do not ascend, so answers "
                    "cannot be found in its tokens; use another conversion of it"
                )
            yield Encoded(np.asarray(item.ids, dtype=np.int32), bounds[:, 0], bounds[:, 1])

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
        self.name = "gigatoken"
        self.check(_TRAPS)

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Yield the tokens of each text, with bounds in bytes."""
        for text in texts:
            if self._num_checked < _CHECKED_FIRST:
                self.check([text])
            data = text.encode()
            ids = self._fast.encode(data).astype(np.int32)
            ends = np.cumsum(self._lengths[ids])
            if int(ends[-1] if len(ends) else 0) != len(data):
                yield from self._reference.encode([text])
                continue
            yield Encoded(ids, np.concatenate([_ZERO, ends[:-1]]), ends, in_bytes=True)

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
        wanted: One of ``ENCODERS``; ``auto`` tries gigatoken where it is installed.

    Raises:
        UnfaithfulError: gigatoken takes the tokenizer and encodes otherwise.
    """
    if wanted != "auto" or not has("gigatoken") or not _is_byte_level(tokenizer_json):
        return reference
    import gigatoken

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
    """Trained tokens of a sample.

    Attributes:
        first: int64 [N]. First trained token of each span; never the first one of the sample.
        last: int64 [N]. Behind the last one.
        num_border_tokens: Tokens that lie half in a span and are not trained.
    """

    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    num_border_tokens: int


def trained_tokens(encoded: Encoded, text: str, spans: Sequence[Span]) -> Turns:
    """Return the tokens that lie wholly in each span.

    Example:
        Tokens ``Hi|!|<e>|?`` start at [0, 2, 3, 6]; the span (0, 6, "<e>") holds tokens 1 and 2.
    """
    starts = np.fromiter((span.start for span in spans), np.int64, len(spans))
    ends = np.fromiter((span.end for span in spans), np.int64, len(spans))
    if encoded.in_bytes and not text.isascii():
        starts, ends = _in_bytes(text, starts, ends)
    first = np.searchsorted(encoded.starts, starts, "left")
    if all(span.stop is not None for span in spans):
        # A stop token with `rstrip` swallows the blanks behind it and ends outside the span.
        last = np.searchsorted(encoded.starts, ends, "left")
        borders = starts
    else:
        stopped = np.fromiter((span.stop is not None for span in spans), np.bool_, len(spans))
        last = np.where(
            stopped,
            np.searchsorted(encoded.starts, ends, "left"),
            np.searchsorted(encoded.ends, ends, "right"),
        )
        borders = np.concatenate([starts, ends[~stopped]])
    return Turns(np.maximum(first, 1), last, _num_straddling(encoded, borders))


def _num_straddling(encoded: Encoded, borders: npt.NDArray[np.int64]) -> int:
    begun = np.searchsorted(encoded.starts, borders, "left")
    ended = np.searchsorted(encoded.ends, borders, "right")
    return int(np.maximum(begun - ended, 0).sum())


def _in_bytes(
    text: str, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    edges = np.stack([starts, ends], axis=1).ravel()  # ascends: spans do
    at = done = 0
    out = np.empty(len(edges), np.int64)
    for number, edge in enumerate(edges.tolist()):
        done += len(text[at:edge].encode())
        at, out[number] = edge, done
    return out[::2], out[1::2]
