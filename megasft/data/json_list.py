"""Records of one large JSON list, cut out of the text without parsing it.

A list can be larger than memory, and parsing it here would only repeat what the workers do. So each
record leaves as the bytes it is written in, cut at the commas that stand in no string and in no
bracket but the list's own; whether it is JSON is found by who parses it, record by record. Only
what is about the list is found here: that it ends, that nothing follows, that no record is empty.
numpy looks at a block at a time; regular expressions took twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from megasft.data.conversation import MAX_RECORD_BYTES
from megasft.errors import DataError

_BLOCK: Final = 256 * 1024
_QUOTE, _COMMA = b'",'
_DEEPER: Final = np.zeros(256, np.int8)
_DEEPER[list(b"[{")], _DEEPER[list(b"]}")] = 1, -1
_IS_MARK: Final = np.zeros(256, np.bool_)
_IS_MARK[list(b'"[]{},')] = True


class _State(NamedTuple):
    """Where in the list a block begins.

    Attributes:
        depth: Brackets around it; 0 behind the end of the list.
        in_string: Whether it begins within a string.
    """

    depth: int = 1
    in_string: bool = False


def split_list(read: Callable[[int], bytes], shown: str) -> Iterator[bytes]:
    """Yield the records of a JSON list as they are written, without the blanks around them.

    Of a record longer than a record may be, only as much is kept as shows that it is too long.

    Args:
        read: Returns up to so many bytes of a text that starts with ``[``; none at its end.
        shown: Name of the file, for errors.

    Raises:
        DataError: The list is cut off, goes on behind its end, or lacks a record at a comma.

    Example:
        >>> import io
        >>> list(split_list(io.BytesIO(b'[{"a": [1, 2]}, 7]').read, "a.json"))
        [b'{"a": [1, 2]}', b'7']
    """
    state, rest, line, is_first = _State(), b"", 1, True
    for block in _blocks(read):
        cuts, state = _cuts(block, state)
        start = 0
        for cut in cuts:
            record = _kept(rest, block[start:cut])
            record = record if len(record) > MAX_RECORD_BYTES else record.rstrip()
            if record:
                yield record
            elif not is_first or block[cut] == _COMMA:  # [] alone holds none
                raise _broken(shown, line + block.count(b"\n", 0, cut), "a record is missing")
            rest, start, is_first = b"", cut + 1, False
        rest = _kept(rest, block[start:])
        line += block.count(b"\n")
        if state.depth == 0 and rest:
            raise _broken(shown, line - rest.count(b"\n"), "something follows the end of the list")
    if state.depth:
        raise _broken(shown, line, "the list does not end")


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the text behind the first bracket, with no escape cut in two."""
    is_inside, left = False, b""
    while block := read(_BLOCK):
        if not is_inside:
            head, bracket, block = block.partition(b"[")
            is_inside, left = bool(bracket), b"\n" * head.count(b"\n")
        block = left + block
        num_backslashes = len(block) - len(block.rstrip(b"\\"))
        left = b"\\" * (num_backslashes % 2)
        yield block.removesuffix(left)


def _cuts(block: bytes, state: _State) -> tuple[list[int], _State]:
    """Return where records end: at the list's own commas and at its last bracket."""
    if state.depth == 0:
        return [], state
    # Escaped quotes end no string. Pairs of backslashes go first: in \\" the quote is not escaped.
    plain = block.replace(rb"\\", b"..").replace(rb"\"", b"..") if b"\\" in block else block
    text = np.frombuffer(plain, np.uint8)
    places = np.flatnonzero(_IS_MARK[text])
    marks = text[places]
    num_quotes = np.cumsum(marks == _QUOTE) + state.in_string
    in_string = bool(num_quotes[-1] % 2) if len(num_quotes) else state.in_string
    is_outside = (num_quotes % 2 == 0) & (marks != _QUOTE)
    places, marks = places[is_outside], marks[is_outside]
    depths = state.depth + np.cumsum(_DEEPER[marks], dtype=np.int64)
    depth = int(depths[-1]) if len(depths) else state.depth
    (ends,) = np.nonzero(depths == 0)
    if len(ends):
        last = int(ends[0]) + 1
        places, marks, depths = places[:last], marks[:last], depths[:last]
        depth, in_string = 0, False
    is_cut = ((marks == _COMMA) & (depths == 1)) | (depths == 0)
    return places[is_cut].tolist(), _State(depth, in_string)


def _kept(rest: bytes, piece: bytes) -> bytes:
    if len(rest) > MAX_RECORD_BYTES:
        return rest
    return (rest + piece).lstrip()[: MAX_RECORD_BYTES + 1]


def _broken(shown: str, line: int, fault: str) -> DataError:
    return DataError(
        f"{shown}:{line}: not JSON: {fault}; of a broken list no record is used "
        "(0 conversations): mend it, or store one record a line"
    )
