"""The token store: what its bytes mean, how it is written and how it is read.

A store is a directory that is either whole or refused:

    tokens.bin/.idx   token ids, one sequence per sample, document order; Megatron's IndexedDataset
                      format (uint16 below 65,500 ids, else int32), so stock Megatron can read it
    turns.bin/.idx    one int32 sequence per sample: its turn records (schema.TURN_FIELDS), flat
    lineage.npy       int64 [S, 2]: source file (position in store.json) and line of each sample
    store.json        everything else, written last

The .idx bytes are written here with numpy instead of Megatron's builder, so that building a store
needs neither torch nor Megatron; tests/megatron reads them back with Megatron's reader. Writing
goes to ``<name>.partial`` and ends in one rename: a build that dies leaves a ``.partial`` folder
which no reader accepts and the next build replaces. Everything is memory-mapped when read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

import numpy as np
import numpy.typing as npt
import orjson

from megasft.errors import StoreError
from megasft.schema import TURN_FIELDS, Sample

FORMAT_VERSION: Final = 1
TOKENS, TURNS, LINEAGE, META = "tokens", "turns", "lineage.npy", "store.json"

_INDEX_MAGIC: Final = b"MMIDIDX\x00\x00"
_DTYPE_CODES: Final[dict[int, np.dtype[Any]]] = {
    4: np.dtype("<i4"),
    8: np.dtype("<u2"),
}  # Megatron's DType enum
_CODE_OF_DTYPE: Final[dict[np.dtype[Any], int]] = {
    dtype: code for code, dtype in _DTYPE_CODES.items()
}
_INDEX_HEADER_BYTES: Final = 34


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype Megatron itself would choose for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class _SequenceWriter:
    """Appends sequences to a .bin file and writes its .idx at the end."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._bin: BinaryIO = prefix.with_suffix(".bin").open("wb")
        self._lengths = array("i")  # four bytes a sample: there may be a hundred million
        self.digest = hashlib.sha256()

    def add(self, sequence: npt.NDArray[np.integer[Any]]) -> None:
        data = np.ascontiguousarray(sequence, dtype=self._dtype).tobytes()
        self._bin.write(data)
        self.digest.update(data)
        self._lengths.append(len(sequence))

    def close(self) -> None:
        _close_synced(self._bin)
        lengths = np.frombuffer(self._lengths, dtype=np.intc).astype("<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        with self._prefix.with_suffix(".idx").open("wb") as idx:
            idx.write(_INDEX_MAGIC + struct.pack("<QB", 1, _CODE_OF_DTYPE[self._dtype]))
            idx.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes() + pointers.astype("<i8").tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _close_synced(idx)
        self.digest.update(lengths.tobytes())

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered, too
            self._bin.close()


def _close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class StoreWriter:
    """Writes a store next to its final place and renames it when it is whole.

    Use as a context manager; leaving it by an exception keeps the ``.partial`` folder, which no
    reader accepts.

    Example:
        >>> with StoreWriter(Path("out"), vocab_size=32_000) as writer:   # doctest: +SKIP
        ...     writer.add(sample, source=0, line=17)
        ...     writer.finish({"counts": {...}, "tokenizer": {...}})
    """

    def __init__(self, path: Path, *, vocab_size: int, overwrite: bool = False) -> None:
        self.path, self._overwrite = path, overwrite
        self.partial = path.with_name(path.name + ".partial")
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial.with_name(self.partial.name + ".lock"))
        try:
            _require_replaceable(path, overwrite=overwrite)
        except StoreError:
            self._unlock()
            raise
        self.restarted = self.partial.exists()
        if self.restarted:
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        self._tokens = _SequenceWriter(self.partial / TOKENS, token_dtype(vocab_size))
        self._turns = _SequenceWriter(self.partial / TURNS, np.dtype("<i4"))
        self._lineage = array("q")
        self._vocab_size = vocab_size
        self._finished = False

    def add(self, sample: Sample, *, source: int, line: int) -> None:
        """Append a sample.

        Args:
            sample: Its turns ascend, do not overlap and lie in ``[1, len(tokens)]``.
            source: Position of its file in the ``sources`` of store.json.
            line: Line (or record) of that file, counted from 1.

        Raises:
            StoreError: It cannot be written, because the disk is full for one; nothing is left.
        """
        try:
            self._tokens.add(sample.tokens)
            self._turns.add(sample.turns.reshape(-1))
        except OSError as error:
            raise self._unwritable(error) from None
        self._lineage.extend((source, line))

    def finish(self, meta: dict[str, Any]) -> None:
        """Write store.json last, make everything durable, and rename the folder into place.

        Args:
            meta: Facts for store.json (tokenizer, special tokens, categories, counts, sources).

        Raises:
            StoreError: It cannot be written, because the disk is full for one; nothing is left.
        """
        try:
            self._write_rest(meta)
        except OSError as error:
            raise self._unwritable(error) from None
        self._rename_into_place()
        self._finished = True

    def _write_rest(self, meta: dict[str, Any]) -> None:
        self._tokens.close()
        self._turns.close()
        lineage = np.frombuffer(self._lineage, dtype=np.int64).reshape(-1, 2)
        with (self.partial / LINEAGE).open("wb") as file:
            np.save(file, lineage)
            _close_synced(file)
        digest = hashlib.sha256(self._tokens.digest.digest() + self._turns.digest.digest())
        whole = {
            "format_version": FORMAT_VERSION,
            "fingerprint": digest.hexdigest()[:32],
            "turn_fields": list(TURN_FIELDS),
            "vocab_size": self._vocab_size,
            **meta,
        }
        with (self.partial / META).open("wb") as file:
            file.write(orjson.dumps(whole, option=orjson.OPT_INDENT_2) + b"\n")
            _close_synced(file)

    def _unwritable(self, error: OSError) -> StoreError:
        self._tokens.abandon()
        self._turns.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)  # it would keep the disk full
        return StoreError(
            f"{self.partial} cannot be written: {error.strerror or error}, after "
            f"{len(self._lineage) // 2:,} samples; free space there, or choose another --output"
        )

    def _rename_into_place(self) -> None:
        replaced = self.path.with_name(self.path.name + ".replaced")
        if replaced.exists():
            shutil.rmtree(replaced)
        if self._overwrite and self.path.exists():
            self.path.rename(replaced)
        self.partial.rename(self.path)
        if replaced.exists():
            shutil.rmtree(replaced)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self._tokens.abandon()
            self._turns.abandon()
        self._unlock()

    def _unlock(self) -> None:
        self.partial.with_name(self.partial.name + ".lock").unlink(missing_ok=True)
        os.close(self._lock)


def _require_replaceable(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already; pass --overwrite to replace it")
    if path.exists() and not (path / META).is_file():
        raise StoreError(
            f"{path} exists and is not a token store; it is not replaced, move it away"
        )


def _lock(path: Path) -> int:
    """Take the build lock; the kernel frees it when the process dies, however it dies."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StoreError(
                f"another build is writing {path.name.removesuffix('.partial.lock')} right now; "
                "wait for it, or choose another --output"
            ) from None
        # The build before may have removed the file between our two calls: lock the one that lasts.
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
        os.close(handle)


@dataclass(frozen=True, slots=True)
class SequenceFile:
    """Memory-mapped sequences of one .bin/.idx pair.

    Attributes:
        values: dtype [total]. All sequences end to end, memory-mapped.
        lengths: int32 [S]. Elements of each sequence.
        offsets: int64 [S + 1]. Element at which each sequence starts in ``values``.
    """

    values: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __getitem__(self, index: int) -> npt.NDArray[np.integer[Any]]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class Sequences(Protocol):
    """What a store's readers ask of token ids: lengths of all sequences, and one of them."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 [S]. Elements of each sequence."""
        ...

    def __getitem__(self, index: int) -> npt.NDArray[np.integer[Any]]: ...


@dataclass(frozen=True, slots=True)
class TokenStore:
    """A whole store, memory-mapped; opening it reads only headers.

    Several stores read as one (``store_group.py``) are a TokenStore too.

    Attributes:
        path: Its folder; of several stores, that of the first.
        meta: Contents of store.json.
        tokens: Token ids of each sample.
        turns: Flat turn records of each sample.
        lineage: int64 [S, 2]. Source file and line of each sample.
    """

    path: Path
    meta: dict[str, Any]
    tokens: Sequences
    turns: SequenceFile
    lineage: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens.lengths)

    @property
    def name(self) -> str:
        """What messages call it: its folder, or all of them."""
        return " + ".join(self.meta.get("stores", [str(self.path)]))

    @property
    def fingerprint(self) -> str:
        """Hash of all token ids and turn records; a plan made for another one is refused."""
        return str(self.meta["fingerprint"])

    def sample(self, index: int) -> Sample:
        """Return one sample; its arrays view the memory map where the dtype allows."""
        return Sample(
            np.asarray(self.tokens[index], dtype=np.int32),
            np.asarray(self.turns[index], dtype=np.int32).reshape(-1, len(TURN_FIELDS)),
        )

    def source_line(self, index: int) -> str:
        """Return ``file:17`` (or ``file:record 17``) of the conversation a sample was made from."""
        number, line = (int(x) for x in self.lineage[index])
        source = self.meta["sources"][number]
        has_lines = source.get("kind", "jsonl") == "jsonl"
        return f"{source['path']}:{'' if has_lines else 'record '}{line}"


def open_store(path: Path | str) -> TokenStore:
    """Open a store, or say what is wrong with it.

    Raises:
        StoreError: It is missing, half-written, of another format version, or its files do not
            have the sizes its index promises.
    """
    path = Path(path)
    if not (path / META).is_file():
        partial = path.with_name(path.name + ".partial")
        if path.name.endswith(".partial") or (partial.exists() and not path.exists()):
            raise StoreError(
                f"{path} is half-written: its build did not finish; run `megasft build` again"
            )
        raise StoreError(f"{path} is not a token store (no {META}); make one with `megasft build`")
    meta = orjson.loads((path / META).read_bytes())
    if meta.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {meta.get('format_version')}, this megasft reads "
            f"{FORMAT_VERSION}; build the store again"
        )
    tokens, turns = _open_sequences(path / TOKENS), _open_sequences(path / TURNS)
    try:
        lineage = np.load(path / LINEAGE, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / LINEAGE} is damaged ({error}); build the store again") from None
    if not len(tokens.lengths) == len(turns.lengths) == len(lineage):
        raise StoreError(
            f"{path} is damaged: {len(tokens.lengths):,} samples, {len(turns.lengths):,} turn "
            f"records and {len(lineage):,} lineage rows should be equal; build it again"
        )
    return TokenStore(path, meta, tokens, turns, lineage)


def _open_sequences(prefix: Path) -> SequenceFile:
    idx, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    head = _first_bytes(idx, _INDEX_HEADER_BYTES)
    if len(head) < _INDEX_HEADER_BYTES or not head.startswith(_INDEX_MAGIC) or not data.is_file():
        raise StoreError(f"{prefix}.idx/.bin is missing or not an index; build the store again")
    dtype = _DTYPE_CODES[head[17]]
    (count,) = struct.unpack("<Q", head[18:26])
    wanted = _INDEX_HEADER_BYTES + count * (4 + 8) + (count + 1) * 8
    if idx.stat().st_size != wanted:
        raise StoreError(
            f"{idx} has {idx.stat().st_size:,} bytes, its header says {wanted:,}; "
            "build the store again"
        )
    lengths = np.memmap(idx, "<i4", "r", _INDEX_HEADER_BYTES, (count,)) if count else _empty("<i4")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    total = int(offsets[-1])
    if data.stat().st_size != total * dtype.itemsize:
        raise StoreError(
            f"{data} has {data.stat().st_size:,} bytes, its index says "
            f"{total * dtype.itemsize:,}; build the store again"
        )
    values = np.memmap(data, dtype, "r", shape=(total,)) if total else _empty(dtype)
    return SequenceFile(values, lengths, offsets)


def _empty(dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.zeros(0, dtype)  # numpy cannot map a file of no bytes


def _first_bytes(path: Path, count: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(count)
