"""A folder that appears whole or not at all, and is gone on with when its writer died.

It is written beside the output as ``.NAME.partial``, with a file that says what it is made from. A
conversion of the same source goes on where the last one ended; one of another source, or by other
versions, starts over. The rename at the end is the only step that others see.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import orjson

from checkpoint_convert.team import Team
from megasft.errors import ConversionError

SOURCE_FILE: Final = ".source.json"
SLACK_BYTES: Final = 64 * 2**20
"""For what is beside the tensors: tokenizer, metadata."""


def require_free(output: Path, *, overwrite: bool, marker: str) -> None:
    """Check that an output may be written, before any work is done.

    Args:
        output: Where the folder shall be.
        overwrite: Whether an existing one may be replaced.
        marker: File that an earlier conversion would have left there; only such a folder, or an
            empty one, is replaced.

    Raises:
        ConversionError: There is something that must not be replaced.
    """
    if not output.exists():
        return
    is_empty = output.is_dir() and next(output.iterdir(), None) is None
    if is_empty:
        return
    if not overwrite:
        raise ConversionError(
            f"{output} exists; choose another --output, or replace it with --overwrite"
        )
    if not (output / marker).is_file():
        raise ConversionError(
            f"{output} has no {marker}, so it was not written by this command and --overwrite does "
            "not replace it; remove it yourself, or choose another --output"
        )


def describe_files(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return sizes and modification times (ns), by which a changed source is told."""
    return {
        str(path.resolve()): [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files
    }


def require_space(output: Path, num_bytes: int) -> None:
    """Check that the disk has room for what is still to be written.

    Raises:
        ConversionError: It has not.
    """
    place = output.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes + SLACK_BYTES:
        raise ConversionError(
            f"{output} takes {num_bytes / 1e9:,.2f} GB more, and the disk has {free / 1e9:,.2f} GB "
            "free; free some, or choose another --output"
        )


@contextmanager
def resumable_folder(output: Path, source: Mapping[str, Any], team: Team) -> Iterator[Path]:
    """Give the temporary folder beside ``output``, and rename it to ``output`` at the end.

    When the body raises, or the process is killed, the folder stays for the next attempt.

    Args:
        output: Where the folder shall be.
        source: What it is made from, JSON; a temporary folder made from anything else is removed.
        team: Its first process makes the folder and renames it.

    Raises:
        ConversionError: Another conversion is writing there, or the disk is full.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        if team.leads:
            partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, output) if team.leads else nullcontext():
            if team.leads:
                _finish_replacing(output)
                _prepare(partial, source)
            team.wait()
            yield partial
            team.wait()
            if team.leads:
                (partial / SOURCE_FILE).unlink()
                _put_in_place(partial, output)
            team.wait()
    except OSError as error:
        raise ConversionError(
            f"{error.filename or partial}: {error.strerror or error}; {left_at(output)}. The same "
            f"command goes on from {partial}, which you may also remove"
        ) from error


def left_at(output: Path) -> str:
    """Say what a conversion that failed has left under its name."""
    return f"{output} is as it was" if output.exists() else f"nothing is at {output}"


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Hold a lock that the system lets go when the process dies, however it dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"another conversion is writing {output}; wait for it, or choose another --output"
            ) from error
        except OSError:  # file systems that lock no folders
            pass
        yield
    finally:
        os.close(descriptor)


def _prepare(partial: Path, source: Mapping[str, Any]) -> None:
    wanted = orjson.dumps(source, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    path = partial / SOURCE_FILE
    if path.is_file() and path.read_bytes() == wanted:
        return
    for entry in partial.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(wanted)
    temporary.rename(path)


def _put_in_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    replaced = output.with_name(f"{_replaced_prefix(output)}{os.getpid()}")
    output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced)


def _finish_replacing(output: Path) -> None:
    """Bring back, or remove, the earlier folder of a process that died while replacing it."""
    for replaced in sorted(output.parent.glob(f"{_replaced_prefix(output)}*")):
        if output.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(output)


def _replaced_prefix(output: Path) -> str:
    return f".{output.name}.replaced-"
