"""Records of the input files, in order, with the place each came from.

All files are streamed, compressed or not: memory stays flat whatever their size. A file that starts
with ``[`` is one JSON list. The "line" of a list or a table (parquet, Arrow) is the number of the
record. Lines and records count from 1. What a file is, its first bytes say, not its name.

Records leave here as raw bytes, in chunks, because parsing is the workers' job. Of a line longer
than a record may be, only as much is kept as shows that it is too long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO, Final, NamedTuple

from megasft.data.conversation import MAX_RECORD_BYTES
from megasft.data.json_list import split_list
from megasft.data.not_lines import LOOKED_AT, require_lines, require_utf8
from megasft.data.remote import Location, Remote
from megasft.data.streams import open_text
from megasft.data.tables import is_table, read_rows, require_pyarrow
from megasft.errors import DataError

CHUNK_BYTES: Final = 256 * 1024
"""A chunk is full at this size: small enough for a smooth bar, large enough to amortise a pipe."""
_BOM: Final = b"\xef\xbb\xbf"
"""Some editors on Windows write it before the first line."""


class Chunk(NamedTuple):
    """Some consecutive records of one file.

    Attributes:
        source: Position of the file among the inputs.
        records: (line, raw bytes) of each record.
        num_bytes: Bytes of the file this chunk covers.
    """

    source: int
    records: list[tuple[int, bytes]]
    num_bytes: int


JSONL, JSON_LIST, TABLE = "jsonl", "json list", "table"


@dataclass(slots=True)
class Source:
    """One input file; size and hash, as it lies on disk, are known once it was read to its end.

    Attributes:
        path: As the user wrote it; its text is what a user is shown.
        kind: JSONL, or JSON_LIST or TABLE, whose places are records instead of lines.
    """

    path: Location
    kind: str = JSONL
    num_bytes: int = 0
    num_records: int = 0
    sha256: str = field(default="", repr=False)

    def place(self, line: int) -> str:
        """Return ``file:17``, or ``file:record 17`` where there are no lines."""
        return f"{self.path}:{line}" if self.kind == JSONL else f"{self.path}:record {line}"

    def as_meta(self) -> dict[str, Any]:
        """Return what store.json keeps of it."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
        }


def open_sources(paths: Sequence[Location]) -> list[Source]:
    """Check that every input can be read, before anything is written.

    Raises:
        DataError: A file is missing, not a file, empty, or needs a package that is not installed.
    """
    if not paths:
        raise DataError("no input; name at least one file with --input")
    return [Source(path, _kind_of(path)) for path in paths]


def read_chunks(sources: list[Source]) -> Iterator[Chunk]:
    """Yield all records of all files, in order, filling in each source's size and hash.

    Raises:
        DataError: A file holds no record, is damaged, or its JSON list is broken.
    """
    readers = {JSONL: _read_lines, JSON_LIST: _read_list, TABLE: _read_table}
    for index, source in enumerate(sources):
        yield from readers[source.kind](index, source)
        if source.num_records == 0:
            raise DataError(
                f"{source.path}:1: the file holds no record (0 conversations); "
                "remove it from --input"
            )


def _kind_of(path: Location) -> str:
    if not isinstance(path, Remote) and not path.is_file():
        raise DataError(
            f"{path} is not a file; --input takes files, folders and globs of .jsonl, .json, "
            ".parquet and .arrow, URLs such as s3://, and hub:OWNER/NAME[SPLIT]"
        )
    if not isinstance(path, Remote) and path.stat().st_size == 0:
        raise DataError(f"{path}:1: the file is empty (0 conversations); remove it from --input")
    with open_text(path) as (text, _):
        try:
            if is_table(text.peek(4)[:4]):
                require_pyarrow(path)
                return TABLE
            require_utf8(str(path), text.peek(4)[:4])
            return JSON_LIST if _starts_a_list(text) else JSONL
        except EOFError:
            return JSONL  # cut off within the first block: reading its lines finds where


def _read_lines(index: int, source: Source) -> Iterator[Chunk]:
    records: list[tuple[int, bytes]] = []
    size = done = 0
    with open_text(source.path) as (text, counted):
        lines = _lines(text, source)
        first = list(islice(lines, LOOKED_AT))
        require_lines(str(source.path), [data for _, data in first])
        for line, data in chain(first, lines):
            size += len(data)
            if not data.isspace():  # blank lines are no records
                records.append((line, data))
            if size >= CHUNK_BYTES:
                yield _chunk(index, source, records, counted.num_bytes - done)
                records, size, done = [], 0, counted.num_bytes
        source.sha256 = counted.sha256()
        if size or counted.num_bytes > done:
            yield _chunk(index, source, records, counted.num_bytes - done)


def _lines(text: BinaryIO, source: Source) -> Iterator[tuple[int, bytes]]:
    line = 1
    try:
        while data := text.readline(MAX_RECORD_BYTES + 1):
            yield line, data.removeprefix(_BOM) if line == 1 else data
            if len(data) > MAX_RECORD_BYTES:
                _skip_line(text, data)
            line += 1
    except EOFError:
        raise DataError(
            f"{source.path}:{line}: the compressed data ends in the middle of it, after "
            f"{line - 1:,} whole lines; the file was cut off: copy it again"
        ) from None


def _skip_line(text: BinaryIO, data: bytes) -> None:
    while data and not data.endswith(b"\n"):
        data = text.readline(CHUNK_BYTES)


def _read_list(index: int, source: Source) -> Iterator[Chunk]:
    with open_text(source.path) as (text, counted):

        def records() -> Iterator[bytes]:
            yield from split_list(text.read, str(source.path))
            source.sha256 = counted.sha256()

        yield from _chunks_of(index, source, records(), lambda size: counted.num_bytes)


def _read_table(index: int, source: Source) -> Iterator[Chunk]:
    with open_text(source.path) as (_, counted):
        source.sha256 = counted.sha256()
    # Where in the file a row lies is unknown: the size of the records moves the bar.
    total = counted.num_bytes
    yield from _chunks_of(index, source, read_rows(source.path), lambda size: min(size, total))


def _chunks_of(
    index: int, source: Source, items: Iterator[bytes], place_of: Callable[[int], int]
) -> Iterator[Chunk]:
    records: list[tuple[int, bytes]] = []
    size = done = 0
    for number, item in enumerate(items, start=1):
        records.append((number, item))
        size += len(item)
        if size - done >= CHUNK_BYTES:
            yield _chunk(index, source, records, place_of(size) - source.num_bytes)
            records, done = [], size
    yield _chunk(index, source, records, place_of(sys.maxsize) - source.num_bytes)


def _chunk(index: int, source: Source, records: list[tuple[int, bytes]], size: int) -> Chunk:
    source.num_bytes += size
    source.num_records += len(records)
    return Chunk(index, records, size)


def _starts_a_list(file: BinaryIO) -> bool:
    while block := file.read(4096):
        if text := block.removeprefix(_BOM).lstrip():
            return text.startswith(b"[")
    return False
