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
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from megasft.errors import FlagError
from megasft.files import only_writer, write_whole

HOLD = """
import sys, time
from pathlib import Path
from megasft.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(
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
    ("host", "pid", "created", "is_free"),
    [
        ("here", "mine", "mine", False),
        ("here", "mine", "earlier", True),
        ("here", "gone", "mine", True),
        ("elsewhere", "gone", "mine", False),
    ],
)
def test_without_locks_the_name_is_believed_unless_that_process_is_gone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    pid: str,
    created: str,
    is_free: bool,
) -> None:
    """A process number is used again, so the time it was made at counts."""

    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    made = psutil.Process().create_time() - (3600 if created == "earlier" else 0)
    writer = {
        "host": socket.gethostname() if host == "here" else host,
        "pid": os.getpid() if pid == "mine" else 2**22 + 1,
        "started": "at noon",
        "created": made,
    }
    (tmp_path / ".writer.json").write_text(json.dumps(writer))
    if is_free:
        with only_writer(tmp_path):
            pass
        assert (tmp_path / ".writer.json").read_text() == ""
        return
    refusal = r"started at noon; .*out of reach, remove .*writer\.json"
    with pytest.raises(FlagError, match=refusal), only_writer(tmp_path):
        pass
    assert json.loads((tmp_path / ".writer.json").read_text()) == writer


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", b"1")
    write_whole(tmp_path / "a.json", b"22")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"22")]
