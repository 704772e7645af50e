"""Files on disk that stay whole: small ones replaced at once, and folders with one writer.

A writer is named in a file of the folder, which it locks by ``fcntl.lockf``. The kernel frees that
lock when the process dies, however it dies, also on NFS and over hosts; and unlike ``flock`` no
process that it forked (a data loader's worker, a checkpoint writer) holds on to it. Where a file
system has no locks, the name in the file is all there is: it is believed unless it is of a process
of this host that is gone.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import orjson
import psutil

from megasft.errors import FlagError

logger = logging.getLogger(__name__)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of this process beside the name, and rename it; the folder is there.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "best.json"
        >>> write_whole(path, b"{}")
        >>> [file.name for file in path.parent.iterdir()]
        ['best.json']
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    unfinished.replace(path)


class Writer(NamedTuple):
    """A process that writes to a folder.

    Attributes:
        host: Where it runs.
        pid: Its number there.
        started: When it began to write, for people.
        created: When the process was made, seconds since 1970: numbers are used again.
    """

    host: str
    pid: int
    started: str
    created: float

    @property
    def is_alive(self) -> bool:
        """Whether it may still be writing; of another host that cannot be known."""
        if self.host != socket.gethostname():
            return True
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < 1.0)
        except psutil.NoSuchProcess:
            return False


@contextmanager
def only_writer(folder: Path, *, name: str = ".writer.json") -> Iterator[None]:
    """Be the only process that writes to a folder, while the context lasts.

    Args:
        folder: It is made when it is not there.
        name: Of the file that names the writer; it stays behind, empty.

    Raises:
        FlagError: Another process writes there; it is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with path.open("a+b") as file:
        is_free: bool | None = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            is_free = False
        except OSError:  # a file system without locks
            is_free = None
        before = _read(file)
        if is_free is None:
            is_free = before is None or not before.is_alive
        if not is_free:
            raise FlagError(_refusal(folder, path, before))
        if before is not None:
            logger.info(
                "%s: process %d on %s, which wrote there since %s, is gone; this one takes over",
                *(folder, before.pid, before.host, before.started),
            )
        _write(file, orjson.dumps(_this_process()._asdict()))
        try:
            yield
        finally:
            _write(file, b"")


def _this_process() -> Writer:
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    created = psutil.Process().create_time()
    return Writer(socket.gethostname(), os.getpid(), started, created)


def _refusal(folder: Path, path: Path, writer: Writer | None) -> str:
    who = "another process"
    if writer is not None:
        who = f"process {writer.pid} on {writer.host}, started {writer.started}"
    return (
        f"{folder} is being written by {who}; wait for it or end it, or give this run a folder of "
        f"its own. (Should that process be gone and its host out of reach, remove {path})"
    )


def _read(file: IO[bytes]) -> Writer | None:
    """Return whom the file names; None for an empty file, or one that is just being written."""
    file.seek(0)
    try:
        return Writer(**orjson.loads(file.read()))
    except (orjson.JSONDecodeError, TypeError):
        return None


def _write(file: IO[bytes], content: bytes) -> None:
    file.truncate(0)  # opened for appending, so that the next byte is the first
    file.write(content)
    file.flush()
