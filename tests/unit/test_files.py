"""One writer of a folder at a time, whatever becomes of it."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from megasft import files
from megasft.errors import FlagError
from megasft.files import only_writer, require_no_writer, write_whole
from tests.other_writer import HOLD, other_writer


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the folder."""
    with other_writer(tmp_path) as process:
        yield process


def test_a_second_writer_is_refused_and_the_first_is_named(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(FlagError) as caught, only_writer(tmp_path):
        pass
    message = str(caught.value)
    named = (
        f"{tmp_path} is being written by process {holder.pid} on {socket.gethostname()}, started"
    )
    assert message.startswith(named)
    assert f"{json.loads((tmp_path / '.writer.json').read_text())['started']}; wait" in message


def test_a_folder_of_a_process_that_was_killed_is_taken_over(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    before = (tmp_path / ".writer.json").stat()
    require_no_writer(tmp_path)
    assert (tmp_path / ".writer.json").stat().st_mtime_ns == before.st_mtime_ns, "nothing changes"
    with only_writer(tmp_path):
        assert json.loads((tmp_path / ".writer.json").read_text())["pid"] == os.getpid()
    assert f"process {holder.pid} on " in caplog.text and "is gone" in caplog.text
    with only_writer(tmp_path):
        pass
    assert caplog.text.count("is gone") == 1, "a writer that ended by itself is nobody to name"


def test_a_process_that_the_writer_forked_does_not_hold_on_to_it(tmp_path: Path) -> None:
    """As a data loader's worker, or a checkpoint writer that outlives its run."""
    fork = multiprocessing.get_context("fork")
    end = fork.Event()
    with only_writer(tmp_path):
        child = fork.Process(target=end.wait)
        child.start()
    try:
        script = HOLD.replace("time.sleep(600)", "")
        command = [sys.executable, "-c", script, str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    finally:
        end.set()
        child.join()


@pytest.mark.parametrize(
    ("host", "pid", "created", "has_locks", "is_free"),
    [
        ("here", "mine", "mine", False, False),
        ("here", "mine", "earlier", False, True),
        ("here", "gone", "mine", False, True),
        ("elsewhere", "gone", "mine", False, True),
        ("elsewhere", "beating", "mine", False, False),
        ("elsewhere", "gone", "mine", True, True),
        ("elsewhere", "beating", "mine", True, False),
    ],
)
def test_where_locks_do_not_tell_a_process_is_looked_for_and_another_host_is_watched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    pid: str,
    created: str,
    has_locks: bool,
    is_free: bool,
) -> None:
    """A process number is used again, so the time it was made at counts.

    A lock that is granted says nothing of a writer on another host, where a file system locks for
    each host alone.
    """

    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "no locks")

    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(files, "BEAT_SECONDS", 0.1)
    made = psutil.Process().create_time() - (3600 if created == "earlier" else 0)
    writer = {
        "host": socket.gethostname() if host == "here" else host,
        "pid": os.getpid() if pid == "mine" else 2**22 + 1,
        "started": "at noon",
        "created": made,
    }
    path = tmp_path / ".writer.json"
    path.write_text(json.dumps(writer))
    ends = threading.Event()
    with path.open("ab") as file:
        heart = threading.Thread(target=files._beat, args=(file.fileno(), ends))
        if pid == "beating":
            heart.start()
        if is_free:
            with only_writer(tmp_path):
                pass
            assert path.read_text() == ""
        else:
            with pytest.raises(FlagError, match="started at noon; wait"), only_writer(tmp_path):
                pass
            assert json.loads(path.read_text()) == writer
        ends.set()
        if pid == "beating":
            heart.join()


def test_a_writer_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BEAT_SECONDS", 0.02)
    path = tmp_path / ".writer.json"
    with only_writer(tmp_path):
        before, deadline = path.stat().st_mtime_ns, time.monotonic() + 20
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert json.loads(path.read_text())["pid"] == os.getpid(), "and leaves its content"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"file/ckpt/\.writer\.json cannot be written \(.*; name"
    with pytest.raises(FlagError, match=message), only_writer(tmp_path / "file" / "ckpt"):
        pass


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", b"1")
    write_whole(tmp_path / "a.json", b"22")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"22")]
