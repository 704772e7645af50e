"""Files that do not lie on this machine under their own path: URLs, and what a hub name means.

Everything is opened through fsspec, which is an extra (``megasft[data]``) and imported here alone;
the driver of a store (s3fs, gcsfs, ...) is the user's to install, and finds keys where that driver
always does (environment, ``~/.aws``, ``~/.config/fsspec``). Text is streamed. Tables are read in
place, by ranges, after a first pass that hashes them: twice the traffic, but no disk of the size
of the file, and any parquet writer. Drivers share no tree of errors, so whatever one raises becomes
a DataError here. What users read, and store.json keeps, leaves out passwords and signed queries.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

from megasft.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_WEB: Final = ("http", "https")


@dataclass(frozen=True, slots=True)
class Remote:
    """One file, opened by a file system of fsspec.

    Attributes:
        shown: What users read and can give as ``--input`` again; its text is this.
        path: Where it lies for that file system.
        files: The file system (``fsspec.AbstractFileSystem``).
        num_bytes: Its size; 0 where the server does not say.
    """

    shown: str
    path: str
    files: Any
    num_bytes: int = 0

    def __str__(self) -> str:
        return self.shown

    @property
    def name(self) -> str:
        """The last part of its path, without a query."""
        return self.path.partition("?")[0].rstrip("/").rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """Return all of a small file."""
        with self.open() as file:
            return file.readall()

    def open(self) -> RemoteFile:
        """Open it for reading.

        Raises:
            DataError: It cannot be opened.
        """
        with _named(self.shown):
            return RemoteFile(self, self.files.open(self.path, "rb"))


Location = Path | Remote


class RemoteFile(io.RawIOBase):
    """A file that fills what it is asked to fill, and says where it broke off."""

    def __init__(self, remote: Remote, file: Any) -> None:
        self._remote, self._file, self._position = remote, file, 0

    def readable(self) -> bool:
        """Say yes, as io.BufferedReader asks."""
        return True

    def seekable(self) -> bool:
        """Ask the driver: a web server may not serve ranges."""
        return bool(self._file.seekable())

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer; only the end of the file leaves it short."""
        view, count = memoryview(buffer).cast("B"), 0
        with _named(self._remote.shown):
            while count < len(view) and (data := self._file.read(len(view) - count)):
                view[count : count + len(data)] = data
                count += len(data)
        self._position += count
        if count < len(view) and self._position < self._remote.num_bytes:
            raise DataError(
                f"{self._remote.shown} broke off after {self._position:,} of "
                f"{self._remote.num_bytes:,} bytes; build again"
            )
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the file."""
        with _named(self._remote.shown):
            self._position = int(self._file.seek(offset, whence))
        return self._position

    def tell(self) -> int:
        """Return the place the next read starts at."""
        return self._position

    def close(self) -> None:
        """Close the driver's file too."""
        if not self.closed:
            self._file.close()
        super().close()


def is_url(text: str) -> bool:
    """Say whether this names something that fsspec opens.

    Example:
        >>> is_url("s3://bucket/a.jsonl"), is_url("data/a.jsonl"), is_url("hub:openai/gsm8k")
        (True, False, False)
    """
    return _URL.match(text) is not None


def size_of(location: Location) -> int:
    """Return the bytes of a file as far as they are known before it is read; else 0."""
    if isinstance(location, Remote):
        return location.num_bytes
    return location.stat().st_size if location.is_file() else 0


def list_files(url: str) -> dict[str, Remote] | Remote:
    """Return the file of a URL, or the files of a folder or glob by name, at every depth.

    Raises:
        DataError: There is no such thing, its driver is not installed, or it may not be read.
    """
    shown = without_secrets(url)
    files, path = _connect(url)
    with _named(shown):
        if is_glob(url):
            found = files.glob(path, detail=True)
            kept = {str(p): info for p, info in found.items() if info["type"] == "file"}
            if not kept:
                raise DataError(f"{shown} matches no file (0 of it); check the pattern")
            return {p: _remote(files, p, info, url) for p, info in sorted(kept.items())}
        try:
            info = files.info(path)
        except FileNotFoundError:
            raise DataError(f"{shown} is not there; check the name with the store") from None
        if info["type"] == "file":
            return Remote(shown, path, files, info.get("size") or 0)
        root = path.rstrip("/") + "/"
        found = files.find(path, detail=True)
        return {p.removeprefix(root): _remote(files, p, info, url) for p, info in found.items()}


def local_file(shown: str, path: str) -> Remote:
    """Return a file of this machine that is known by another name than its path."""
    files, path = _connect(f"file://{path}")
    with _named(shown):
        return Remote(shown, path, files, files.info(path)["size"])


def is_glob(url: str) -> bool:
    """Say whether a URL is a pattern."""
    # A query starts with "?", and a web server's folder is a page that would be read to its end.
    return any(c in url for c in ("*" if url.startswith(_WEB) else "*?["))


def _remote(files: Any, path: str, info: dict[str, Any], url: str) -> Remote:
    shown = str(files.unstrip_protocol(path))
    outer, chained, inner = url.partition("::")
    if chained:  # simplecache::s3://bucket/*.jsonl, or zip://*.jsonl::s3://bucket/a.zip
        is_same_store = inner.partition("://")[0] == shown.partition("://")[0]
        shown = f"{outer}::{shown}" if is_same_store else f"{shown}::{inner}"
    return Remote(without_secrets(shown), path, files, info.get("size") or 0)


def _connect(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError:
        raise DataError(
            f"{without_secrets(url)} is a URL, and the Python package fsspec, which opens it, is "
            "not installed; pip install 'megasft[data]', or copy the file to this machine"
        ) from None
    protocol = url.rpartition("::")[2].partition("://")[0]
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(protocol, {})
        package = str(known.get("class", protocol)).partition(".")[0]
        if package == "fsspec":
            package = f"'fsspec[{'http' if protocol in _WEB else protocol}]'"
        raise DataError(
            f"{without_secrets(url)} needs a driver for {protocol}:// that is not installed "
            f"({error}); pip install {package}, or copy the file to this machine"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{without_secrets(url)} cannot be opened: {error}; URLs start with s3://, gs://, "
            "hf://, https:// or another protocol of fsspec"
        ) from None
    return files, str(path)


@contextmanager
def _named(shown: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each driver has errors of its own, with nothing in common
        said = re.sub(r"(https?://[^\s?]*\?)[^\s'\")]*", r"\1...", str(error))
        raise DataError(
            f"{shown} cannot be read: {type(error).__name__}: {said}; check the name and your "
            "access to it, and build again"
        ) from None


def without_secrets(url: str) -> str:
    """Return a URL without password and, on the web, without its query, which may be a key."""
    if "::" in url or not url.startswith(_WEB):
        return re.sub(r"://[^/@]*@", "://", url)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "..." if parts.query else "", ""))
