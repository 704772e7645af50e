"""JSON of records, read and written without losing anything: integers of any size, deep nesting.

orjson is ten times faster than the standard library, and reads an integer beyond 64 bits as a
float. So a record is read again by the standard library where it could matter: in fields that a
chat template is given, and only if a number of so many digits stands in the line at all. NaN and
Infinity, which Python's own writer makes of missing numbers, are read as well: a score nobody reads
must not cost the record.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

import orjson

_DIGITS: Final = bytes(ord("0") if chr(i).isdecimal() and i < 128 else 32 for i in range(256))
_LONG_NUMBER: Final = b"0" * 19


def load(data: bytes | str) -> Any:
    """Return what JSON says; NaN and Infinity as floats.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        num_constants = 0

        def constant(name: str) -> float:
            nonlocal num_constants
            num_constants += 1
            return float(name)

        try:
            value = json.loads(data, parse_constant=constant)
        except (ValueError, RecursionError):
            raise error from None
        # The standard library takes other things, too, that are not JSON.
        if not num_constants and not has_long_number(_bytes(data)):
            raise
        return value


def has_long_number(data: bytes) -> bool:
    """Say whether ``load`` may have read an integer as a float."""
    return _LONG_NUMBER in data.translate(_DIGITS)  # some ten times faster than a pattern


def load_exactly(data: bytes | str) -> Any:
    """Return what JSON says, integers of any size as integers; NaN is no JSON here.

    Raises:
        ValueError: It is not JSON, or nested too deeply to be read.
    """
    data = _bytes(data)
    if not has_long_number(data):
        return orjson.loads(data)
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def holds_constant(value: Any) -> bool:
    """Say whether NaN or Infinity is in a value."""
    try:
        json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return True
    return False


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return a value as JSON, without blanks."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except orjson.JSONEncodeError:  # beyond 64 bits, or nested beyond 254
        return json.dumps(
            value, default=str, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys
        ).encode()


def _bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
