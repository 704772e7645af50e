"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megasft.errors import ConversionError


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


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``output``, and rename it to ``output`` at the end.

    When the body raises, the temporary folder is removed and what was there before stays.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced)
