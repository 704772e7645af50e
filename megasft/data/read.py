"""Records of the input files, in order, with the place each came from.

A .jsonl file is streamed: memory stays flat whatever its size. A file that starts with ``[`` is one
JSON list; it has to be read whole, and its "line" is the number of the record. Both count from 1.
Records leave here as raw bytes, in chunks, because parsing is the workers' job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import orjson

from megasft.errors import DataError

CHUNK_BYTES: Final = 256 * 1024
"""A chunk is full at this size: small enough for a smooth bar, large enough to amortise a pipe."""


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


@dataclass(slots=True)
class Source:
    """One input file; size and hash are known once it has been read to its end.

    Attributes:
        path: As the user wrote it.
        is_list: It is one JSON list, so its places are records instead of lines.
    """

    path: Path
    is_list: bool = False
    num_bytes: int = 0
    num_records: int = 0
    sha256: str = field(default="", repr=False)

    def place(self, line: int) -> str:
        """Return ``file:17``, or ``file:record 17`` for a JSON list."""
        return f"{self.path}:record {line}" if self.is_list else f"{self.path}:{line}"

    def as_meta(self) -> dict[str, Any]:
        """Return what store.json keeps of it."""
        kind = "json list" if self.is_list else "jsonl"
        return {
            "path": str(self.path),
            "kind": kind,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
        }


def open_sources(paths: list[Path]) -> list[Source]:
    """Check that every input can be read, before anything is written.

    Raises:
        DataError: A file is missing, not a file, or empty.
    """
    if not paths:
        raise DataError("no input; name at least one file with --input")
    sources = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is not a file; --input takes .jsonl or .json files")
        if path.stat().st_size == 0:
            raise DataError(
                f"{path}:1: the file is empty (0 conversations); remove it from --input"
            )
        try:
            with path.open("rb") as file:
                sources.append(Source(path, is_list=_starts_a_list(file)))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return sources


def read_chunks(sources: list[Source]) -> Iterator[Chunk]:
    """Yield all records of all files, in order, filling in each source's size and hash.

    Raises:
        DataError: A file holds no record, or its JSON list is broken.
    """
    for index, source in enumerate(sources):
        yield from (_read_list if source.is_list else _read_lines)(index, source)
        if source.num_records == 0:
            raise DataError(
                f"{source.path}:1: the file holds no record (0 conversations); "
                "remove it from --input"
            )


def _read_lines(index: int, source: Source) -> Iterator[Chunk]:
    digest = hashlib.sha256()
    records: list[tuple[int, bytes]] = []
    size = 0
    with source.path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            digest.update(data)
            size += len(data)
            if not data.isspace():  # blank lines are no records
                records.append((line, data))
            if size >= CHUNK_BYTES:
                yield _chunk(index, source, records, size)
                records, size = [], 0
    if size:
        yield _chunk(index, source, records, size)
    source.sha256 = digest.hexdigest()


def _read_list(index: int, source: Source) -> Iterator[Chunk]:
    data = source.path.read_bytes()
    try:
        items = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{source.path}:{error.lineno}: not JSON: {error}; a JSON list is read whole, so none "
            "of its records can be used (0 conversations); mend it, or store one record a line"
        ) from None
    source.sha256 = hashlib.sha256(data).hexdigest()
    per_record, rest = divmod(len(data), max(len(items), 1))
    del data
    records: list[tuple[int, bytes]] = []
    size = rest
    for number, item in enumerate(items, start=1):
        records.append((number, orjson.dumps(item)))
        size += per_record
        if size >= CHUNK_BYTES:
            yield _chunk(index, source, records, size)
            records, size = [], 0
    if records:
        yield _chunk(index, source, records, size)


def _chunk(index: int, source: Source, records: list[tuple[int, bytes]], size: int) -> Chunk:
    source.num_bytes += size
    source.num_records += len(records)
    return Chunk(index, records, size)


def _starts_a_list(file: BinaryIO) -> bool:
    while block := file.read(4096):
        if text := block.lstrip():
            return text.startswith(b"[")
    return False
