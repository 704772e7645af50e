"""Files with one fault for all their lines, refused once with its cause instead of line by line.

A file in UTF-16, one with the line ends of an old Macintosh, and one JSON object written over many
lines would each be as many bad records as they have lines, none of which names the cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import orjson

from megasft.errors import DataError

_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
LOOKED_AT: Final = 3
"""Lines at the beginning of a file that show its kind."""


def require_utf8(shown: str, beginning: bytes) -> None:
    """Refuse a file in UTF-16 or UTF-32.

    Args:
        shown: Name of the file.
        beginning: Its first four bytes.

    Raises:
        DataError: It is in one of them.
    """
    if not (beginning.startswith(_UTF16_BOMS) or b"\0" in beginning):
        return
    if beginning.count(0) > 2 or beginning.endswith(b"\0\0"):
        name = "UTF-32"
    elif beginning.startswith(_UTF16_BOMS):
        name = "UTF-16"
    else:
        name = "UTF-16BE" if beginning.startswith(b"\0") else "UTF-16LE"
    raise DataError(
        f"{shown}:1: the file is in {name}, and records are read as UTF-8 (0 conversations); "
        f"convert it, such as with iconv -f {name} -t UTF-8"
    )


def require_lines(shown: str, lines: Sequence[bytes]) -> None:
    """Refuse a file whose records are not its lines.

    Args:
        shown: Name of the file.
        lines: Its first ones.

    Raises:
        DataError: They end in a carriage return alone, or are parts of one object.
    """
    texts = [line.strip() for line in lines if not line.isspace()]
    if texts and b"\r" in texts[0]:
        raise DataError(
            f"{shown}:1: its lines end in a carriage return alone (\\r), so it looks like one line "
            "(0 conversations); convert it, such as with tr '\\r' '\\n'"
        )
    if len(texts) < 2 or not texts[0].startswith(b"{") or any(map(_is_json, texts[:2])):
        return
    # `{` and then a key; or an object that opens a list, and then its first entry.
    if texts[1].startswith(b'"') if texts[0] == b"{" else texts[0].endswith((b"{", b"[", b",")):
        raise DataError(
            f"{shown}:1: the file is JSON over many lines (pretty-printed), and a record is a line "
            "(0 conversations); write it with jq -c . or, where its records are a list within an "
            "object, with jq -c '.NAME[]'"
        )


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
