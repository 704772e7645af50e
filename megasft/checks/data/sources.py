"""The conversations a store was made from, read again from its source files.

A source counts only if it is byte for byte the file the store was built from: size first, then the
sha256 that reading it yields. What its records mean is decided by the same ``FieldMap``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megasft.checks.data.subject import Keys
from megasft.data.conversation import BadRecordError, Conversation
from megasft.data.formats import FieldMap, parse
from megasft.data.held_out import key_of
from megasft.data.read import Source, open_sources, read_chunks
from megasft.errors import DataError
from megasft.store import TokenStore

Found = dict[int, Conversation | BadRecordError]


class SourceChangedError(DataError):
    """A source file is gone or is another one now."""


def conversations_of(store: TokenStore, wanted: list[int], fields: FieldMap) -> Found:
    """Return the conversations of some samples, or what made one unreadable.

    Raises:
        SourceChangedError: The source files are not there, or not those of the build.
    """
    by_place = {(int(s), int(n)): i for i in wanted for s, n in [store.lineage[i]]}
    found: Found = {}
    for place, data in _records(store):
        if (index := by_place.get(place)) is not None:
            found[index] = _parsed(data, fields)
    return found


def keys_of_messages(store: TokenStore, fields: FieldMap) -> Keys:
    """Hash the messages of each sample, blanks at their ends left out.

    Raises:
        SourceChangedError: The source files are not there, or not those of the build.
    """
    keys = np.zeros(len(store), np.uint64)
    index = 0
    for place, data in _records(store):
        if index < len(store) and place == tuple(store.lineage[index].tolist()):
            conversation = _parsed(data, fields)
            assert isinstance(conversation, Conversation), "the build has read it"
            keys[index] = np.uint64(key_of(conversation))
            index += 1
    return keys


def _records(store: TokenStore) -> Iterator[tuple[tuple[int, int], bytes]]:
    expected = store.meta.get("sources", [])
    for item in expected:
        path = Path(item["path"])
        if not path.is_file() or path.stat().st_size != item.get("bytes"):
            raise SourceChangedError(f"{path} is gone, or is not the file the store was made from")
    try:
        sources = open_sources([Path(item["path"]) for item in expected])
        for chunk in read_chunks(sources):
            for line, data in chunk.records:
                yield (chunk.source, line), data
    except DataError as error:
        raise SourceChangedError(str(error)) from None
    _require_same(sources, [item.get("sha256", "") for item in expected])


def _require_same(sources: list[Source], hashes: list[str]) -> None:
    for source, sha256 in zip(sources, hashes, strict=True):
        if source.sha256 != sha256:
            raise SourceChangedError(f"{source.path} has changed since the store was made")


def _parsed(data: bytes, fields: FieldMap) -> Conversation | BadRecordError:
    try:
        return parse(data, fields)
    except BadRecordError as error:
        return error
