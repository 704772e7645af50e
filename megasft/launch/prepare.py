"""Converts the model before a run and exports it after, by the commands a user would type.

A converted checkpoint lies in a cache under the fingerprint of its source, so that a changed folder
is converted anew and an unchanged one never twice. The fingerprint is made of the names, sizes and
times of the weights and of the bytes of everything else: reading terabytes to hash them would cost
more than converting. The conversion runs in a process of its own, because it prepares Megatron for
itself, and a second launch waits for the first by a lock on the file system.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from megasft.errors import ConversionError, FlagError
from megasft.files import MODEL_FILE
from megasft.training.saving import COMPLETE

logger = logging.getLogger(__name__)

TO_MEGATRON: Final = "checkpoint_convert.hf_to_megatron"
TO_HF: Final = "checkpoint_convert.megatron_to_hf"
DIGITS: Final = 12
"""Of the fingerprint in a name: 48 bits."""
SECONDS_BETWEEN_LOOKS: Final = 1.0
MOST_HASHED_BYTES: Final = 64 * 2**20
"""A larger file is told by its size and time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A Hugging Face folder and the checkpoint that is made of it, before the run or after.

    Attributes:
        like: What an export takes configuration and tokenizer from.
        is_verified: Whether the result is compared with its source.
    """

    source: Path
    output: Path
    like: Path | None = None
    is_verified: bool = True


def converted_flags(folder: Path) -> tuple[str, ...] | None:
    """Return the model's flags when a folder is a converted checkpoint, else None."""
    path = folder / MODEL_FILE
    if not path.is_file():
        return None
    return tuple(str(flag) for flag in orjson.loads(path.read_bytes())["flags"])


def model_flags(folder: Path, place: str) -> tuple[str, ...]:
    """Return Megatron's flags for a Hugging Face folder.

    Args:
        folder: With ``config.json``.
        place: Where the folder is named, for an error.

    Raises:
        ConversionError: There is no such folder, or its model is not known.
    """
    from checkpoint_convert.config_map import read_model

    try:
        return tuple(read_model(folder).flags)
    except ConversionError as error:
        raise ConversionError(f"{place}: model.hf: {error}") from error


def cache_name(folder: Path) -> str:
    """Return the name of a folder's conversion, which says from which bytes it was made."""
    return f"{folder.resolve().name}-megatron-{fingerprint(folder)}"


def fingerprint(folder: Path) -> str:
    """Return hexadecimal digits that change when a file of the folder does."""
    from checkpoint_convert.files import FORMAT, MANIFEST

    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name == MANIFEST:
            continue
        stat = path.stat()
        is_small = stat.st_size <= MOST_HASHED_BYTES and path.suffix in (".json", ".jinja", ".txt")
        facts = path.read_bytes() if is_small else str(stat.st_mtime_ns).encode()
        digest.update(orjson.dumps([path.name, stat.st_size, hashlib.sha256(facts).hexdigest()]))
    return digest.hexdigest()[:DIGITS]


def convert(conversion: Conversion, environ: Mapping[str, str]) -> None:
    """Make the converted checkpoint unless it is there; one launch does, the others wait.

    Raises:
        ConversionError: The conversion failed; what it printed stands above.
    """
    output = conversion.output
    if (output / MODEL_FILE).is_file():
        logger.info("%s is converted already: %s", conversion.source, output)
        return
    _name_older(conversion)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if (output / MODEL_FILE).is_file():
            return
        logger.info("converting %s to %s, once", conversion.source, output)
        _run(convert_command(conversion), environ, what=f"{conversion.source} was not converted")


def export(export: Conversion | None, environ: Mapping[str, str]) -> None:
    """Convert the last checkpoint to Hugging Face when training is complete, else say why not.

    An earlier export is replaced when the new one is whole and verified; of the same step it stays.

    Raises:
        ConversionError: The conversion failed; the checkpoint is untouched.
    """
    if export is None:
        return
    if not (export.source / COMPLETE).is_file():
        logger.info("not exported: the run was told to end early; the same command goes on")
        return
    _run(export_command(export), environ, what=f"{export.source} was not exported")


def convert_command(conversion: Conversion) -> list[str]:
    """Return the command that converts a Hugging Face folder."""
    paths = ["--hf", str(conversion.source), "--output", str(conversion.output)]
    return [sys.executable, "-m", TO_MEGATRON, *paths, *_no_verify(conversion)]


def export_command(export: Conversion) -> list[str]:
    """Return the command that converts the last checkpoint."""
    paths = ["--checkpoint", str(export.source), "--like", str(export.like)]
    paths += ["--output", str(export.output), "--update"]
    return [sys.executable, "-m", TO_HF, *paths, *_no_verify(export)]


def _no_verify(conversion: Conversion) -> list[str]:
    return [] if conversion.is_verified else ["--no-verify"]


def _run(command: list[str], environ: Mapping[str, str], *, what: str) -> None:
    code = subprocess.run(command, env=dict(environ), check=False).returncode
    if code != 0:
        raise ConversionError(f"{what} (exit code {code}); the reason stands above")


def _name_older(conversion: Conversion) -> None:
    stem = conversion.output.name[:-DIGITS]
    older = sorted(p.name for p in conversion.output.parent.glob(f"{stem}{'?' * DIGITS}"))
    if older:
        logger.warning(
            "%s has changed since it was converted to %s, which this run does not use and you may "
            "remove",
            conversion.source,
            ", ".join(older),
        )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold a lock for one output, waiting for another launch that has it."""
    path = output.with_name(f".{output.name}.lock")
    with path.open("w") as file:
        is_waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_waiting:
                    logger.info("another launch is converting %s; waiting for it", output)
                is_waiting = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
            except OSError as error:
                raise FlagError(
                    f"{path.parent} is on a file system without locks ({error.strerror}); convert "
                    "once with `megasft convert hf-to-megatron`, and give model.hf its output"
                ) from error
        yield
    # The file stays: removing it would let a third launch lock another file of the same name.
