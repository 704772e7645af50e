"""Bytes of an input file as text wants them, while counting and hashing them as they lie on disk.

gzip and Zstandard are recognised by their first bytes, not by the name. Size and hash are those of
the compressed file, because that is what a user can check later with ``sha256sum``. The Zstandard
reader is written here over ``decompressobj``: the package's own stream reader takes a truncated
file for a complete one and would drop its last conversations without a word.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from megasft.data.remote import Location, Remote
from megasft.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP_MAGIC: Final = b"\x1f\x8b"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_BLOCK: Final = 128 * 1024


class Counted(io.RawIOBase):
    """A raw file that knows the size and hash of what was read from it."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Say yes, as io.BufferedReader asks."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer from the file."""
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view) or 0
        self._digest.update(view[:count])
        self.num_bytes += count
        return count

    def sha256(self) -> str:
        """Read what is left, and return the hash of the whole file."""
        while self.read(_BLOCK):
            pass
        return self._digest.hexdigest()


@contextmanager
def open_text(path: Location) -> Iterator[tuple[io.BufferedReader, Counted]]:
    """Open a file for reading, unpacked; a fault while reading becomes a DataError.

    Raises:
        DataError: The file cannot be read or unpacked.
    """
    try:
        with path.open() if isinstance(path, Remote) else path.open("rb", buffering=0) as file:
            counted = Counted(file)
            yield _unpacked(path, counted), counted
    except EOFError:
        raise DataError(
            f"{path} ends in the middle of its compressed data; it was cut off: copy it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _unpacked(path: Location, counted: Counted) -> io.BufferedReader:
    raw: io.BufferedReader = io.BufferedReader(counted, _BLOCK)
    magic = raw.peek(4)[:4]  # not read and sought back: a web server may not serve ranges
    if magic.startswith(GZIP_MAGIC):
        return io.BufferedReader(_Gzip(fileobj=raw), _BLOCK)
    if magic == ZSTD_MAGIC:
        return io.BufferedReader(_Zstd(path, raw), _BLOCK)
    return raw


class _Gzip(gzip.GzipFile):
    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill less than the buffer rather than lose the lines before a cut."""
        return self.readinto1(buffer)


class _Zstd(io.RawIOBase):
    def __init__(self, path: Location, raw: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{path} is Zstandard-compressed, and the Python package zstandard is not "
                "installed; pip install 'megasft[data]', or unpack it with `zstd -d`"
            ) from None
        self._path, self._raw, self._error = path, raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready and self._fill():
            pass
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _fill(self) -> bool:
        if not self._packed:
            # Text packs a hundredfold at worst; small blocks keep what comes out of one small.
            self._packed = self._raw.read(16 * 1024)
        if self._frame.eof:  # a file may be several frames, one behind the other
            if not self._packed:
                return False
            self._frame = self._new()
        if not self._packed:
            raise EOFError
        try:
            self._ready = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise DataError(f"{self._path} is damaged: {error}; copy it again") from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        return True
