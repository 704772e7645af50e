"""Sequences of integers in a .bin/.idx pair: Megatron's IndexedDataset bytes, written and mapped.

The .idx bytes are written here with numpy instead of Megatron's builder, so that building a store
needs neither torch nor Megatron; tests/megatron reads them back with Megatron's reader.

Opening reads the header and the last entry: the index holds a length and a byte pointer of every
sequence and stays in the memory map, so a rank keeps nothing per sample, whatever the store's size.
Readers take many sequences at once as views. Copying one view after the other into a row proved
four to ten times faster than one gather by token index, because a sequence is contiguous.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
import numpy.typing as npt

from megasft.errors import StoreError

_MAGIC: Final = b"MMIDIDX\x00\x00"
_DTYPE_CODES: Final[dict[int, np.dtype[Any]]] = {
    4: np.dtype("<i4"),
    8: np.dtype("<u2"),
}  # Megatron's DType enum
_CODE_OF_DTYPE: Final[dict[np.dtype[Any], int]] = {
    dtype: code for code, dtype in _DTYPE_CODES.items()
}
_HEADER_BYTES: Final = 34

Integers = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.int64]


class SequenceWriter:
    """Appends sequences to a .bin file and writes its .idx at the end."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._bin: BinaryIO = prefix.with_suffix(".bin").open("wb")
        self._lengths = array("i")  # four bytes a sample: there may be a hundred million
        self.digest = hashlib.sha256()

    def add(self, sequence: Integers) -> None:
        """Append one sequence."""
        data = np.ascontiguousarray(sequence, dtype=self._dtype).tobytes()
        self._bin.write(data)
        self.digest.update(data)
        self._lengths.append(len(sequence))

    def close(self) -> None:
        """Write the index and make both files durable."""
        close_synced(self._bin)
        lengths = np.frombuffer(self._lengths, dtype=np.intc).astype("<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        with self._prefix.with_suffix(".idx").open("wb") as idx:
            idx.write(_MAGIC + struct.pack("<QB", 1, _CODE_OF_DTYPE[self._dtype]))
            idx.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes() + pointers.astype("<i8").tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            close_synced(idx)
        self.digest.update(lengths.tobytes())

    def abandon(self) -> None:
        """Close what is open, written or not."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered, too
            self._bin.close()


def close_synced(file: BinaryIO) -> None:
    """Close a file whose bytes have reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


class Sequences(Protocol):
    """What readers ask of the sequences of one file, or of several."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 [S]. Elements of each sequence."""
        ...

    def __getitem__(self, index: int) -> Integers: ...

    def views(self, numbers: Numbers) -> list[Integers]:
        """Return several sequences, in the order asked for."""
        ...


class FlatSequences(Sequences, Protocol):
    """Sequences that can also be read end to end."""

    @property
    def values(self) -> Integers:
        """Dtype [total]. All sequences end to end."""
        ...

    @property
    def offsets(self) -> Numbers:
        """int64 [S + 1]. Element at which each sequence starts in ``values``."""
        ...


@dataclass(frozen=True)
class SequenceFile:
    """Memory-mapped sequences of one .bin/.idx pair.

    Attributes:
        values: dtype [total]. All sequences end to end, memory-mapped.
        lengths: int32 [S]. Elements of each sequence, memory-mapped.
        pointers: int64 [S]. Byte at which each sequence starts, memory-mapped.
    """

    values: Integers
    lengths: npt.NDArray[np.int32]
    pointers: Numbers

    @cached_property
    def offsets(self) -> Numbers:
        """int64 [S + 1]. Element at which each sequence starts; made, and kept, once asked for."""
        return offsets_of(self.lengths)

    def __getitem__(self, index: int) -> Integers:
        start = int(self.pointers[index]) // self.values.itemsize
        return self.values[start : start + int(self.lengths[index])]

    def views(self, numbers: Numbers) -> list[Integers]:
        """Return several sequences, in the order asked for."""
        starts = self.pointers[numbers] // self.values.itemsize
        ends = starts + self.lengths[numbers]
        values = self.values
        return [values[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def offsets_of(lengths: npt.NDArray[np.integer[Any]]) -> Numbers:
    """Return int64 [S + 1]: where sequences of these lengths start, laid end to end.

    Example:
        >>> offsets_of(np.array([3, 1, 4])).tolist()
        [0, 3, 4, 8]
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def cut(values: Integers, lengths: Sequence[int]) -> list[Integers]:
    """Cut what lies end to end into its sequences; the inverse of laying them so."""
    offsets = offsets_of(np.asarray(lengths, np.int64)).tolist()
    return [values[a:b] for a, b in pairwise(offsets)]


def open_sequences(prefix: Path) -> SequenceFile:
    """Map ``<prefix>.bin`` and ``<prefix>.idx``.

    Raises:
        StoreError: One is missing, or their sizes are not what the index promises.
    """
    idx, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    head = _first_bytes(idx, _HEADER_BYTES)
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC) or not data.is_file():
        raise StoreError(f"{prefix}.idx/.bin is missing or not an index; build the store again")
    dtype = _DTYPE_CODES[head[17]]
    (count,) = struct.unpack("<Q", head[18:26])
    wanted = _HEADER_BYTES + count * (4 + 8) + (count + 1) * 8
    if idx.stat().st_size != wanted:
        raise StoreError(
            f"{idx} has {idx.stat().st_size:,} bytes, its header says {wanted:,}; "
            "build the store again"
        )
    lengths = _map(idx, np.dtype("<i4"), start=_HEADER_BYTES, count=count)
    pointers = _map(idx, np.dtype("<i8"), start=_HEADER_BYTES + 4 * count, count=count)
    total = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if count else 0
    if data.stat().st_size != total:
        raise StoreError(
            f"{data} has {data.stat().st_size:,} bytes, its index says {total:,}; "
            "build the store again"
        )
    values = _map(data, dtype, start=0, count=total // dtype.itemsize)
    return SequenceFile(values, lengths, pointers)


def _map(path: Path, dtype: np.dtype[Any], *, start: int, count: int) -> npt.NDArray[Any]:
    if not count:
        return np.zeros(0, dtype)  # numpy cannot map a file of no bytes
    # Slices of np.memmap itself cost ten times those of the plain array over it.
    return np.asarray(np.memmap(path, dtype, "r", start, (count,)))


def _first_bytes(path: Path, count: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(count)
