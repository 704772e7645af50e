"""Files on disk that stay whole: small ones replaced at once, and folders with one writer.

A writer is named in a file of the folder, which it locks by ``fcntl.lockf``. The kernel frees that
lock when the process dies, however it dies; and unlike ``flock`` no process that it forked (a data
loader's worker, a checkpoint writer) holds on to it.

Some file systems have no such locks, or none that other hosts see (Lustre without ``flock``, NFS
with ``nolock``). So a writer also touches the file every few seconds. Another host's is watched for
some of these beats before it is believed to be gone, whatever the lock says.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, NamedTuple

import orjson
import psutil

from megasft.errors import FlagError

logger = logging.getLogger(__name__)

MODEL_FILE: Final = "megasft_model.json"
"""Of a converted checkpoint: Megatron's flags for the model, and its configuration."""

SIDE_FOLDER: Final = "hf"
"""Of a converted checkpoint: everything of the Hugging Face folder that is not weights."""

WRITER: Final = ".writer.json"
"""The file of a folder that names its writer."""

BEAT_SECONDS: Final = 10.0
BEATS_WAITED: Final = 3
"""Of a writer on another host, which may touch its file late."""


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
    def is_here(self) -> bool:
        """Whether it is of this host."""
        return self.host == socket.gethostname()

    def is_alive(self, path: Path) -> bool:
        """Find out whether it is still writing; of another host that takes some beats.

        Args:
            path: The file that names it.
        """
        if not self.is_here:
            seen = _touched(path)
            deadline = time.monotonic() + BEATS_WAITED * BEAT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 4)
                if _touched(path) != seen:
                    return True
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < 1.0)
        except psutil.NoSuchProcess:
            return False


def require_no_writer(folder: Path) -> None:
    """Check that no other process writes to a folder now; changes nothing.

    Raises:
        FlagError: One does; it is named.
    """
    path = folder / WRITER
    if path.is_file():
        with path.open("rb") as file:
            _take(file, folder, path, fcntl.LOCK_SH)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder, while the context lasts.

    Args:
        folder: It is made when it is not there; the file in it that names the writer is empty
            afterwards.

    Raises:
        FlagError: Another process writes there, which is named; or the folder cannot be written to.
    """
    path = folder / WRITER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise FlagError(
            f"{path} cannot be written ({error.strerror}); name another folder"
        ) from error
    with file:
        before = _take(file, folder, path, fcntl.LOCK_EX)
        if before is not None:
            logger.info(
                "%s: process %d on %s, which wrote there since %s, is gone; this one takes over",
                *(folder, before.pid, before.host, before.started),
            )
        _write(file, orjson.dumps(_this_process()._asdict()))
        ends = threading.Event()
        heart = threading.Thread(target=_beat, args=(file.fileno(), ends), daemon=True)
        heart.start()
        try:
            yield
        finally:
            ends.set()
            heart.join()
            with suppress(OSError):  # a full disk must not hide why the run ended
                _write(file, b"")


def _take(file: IO[bytes], folder: Path, path: Path, kind: int) -> Writer | None:
    """Lock a file; return the writer it still names, one that is gone.

    Raises:
        FlagError: Another process has it.
    """
    is_held, has_locks = False, True
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        is_held = True
    except OSError:
        has_locks = False
    before = _read(file)
    if not is_held and before is not None and not (has_locks and before.is_here):
        is_held = before.is_alive(path)
    if is_held:
        raise FlagError(_refusal(folder, before))
    return before


def _beat(descriptor: int, ends: threading.Event) -> None:
    """Touch a file until the writer ends."""
    while not ends.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)


def _touched(path: Path) -> int:
    """Return when a file was touched; opened again, since a network file system then asks."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _this_process() -> Writer:
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    created = psutil.Process().create_time()
    return Writer(socket.gethostname(), os.getpid(), started, created)


def _refusal(folder: Path, writer: Writer | None) -> str:
    who = "another process"
    if writer is not None:
        who = f"process {writer.pid} on {writer.host}, started {writer.started}"
    return (
        f"{folder} is being written by {who}; wait for it or end it, or give this run a folder of "
        "its own"
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
