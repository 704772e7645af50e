"""What says of a Hugging Face folder which checkpoint it was exported from: a small file in it.

With ``--update`` a later step of the same checkpoint replaces the folder, and the same step leaves
it alone. A folder without the file, or with files that were added or changed since, is the user's
and is never replaced. Paths in the file are relative: it may be published with the model.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from checkpoint_convert.files import MANIFEST
from checkpoint_convert.output_folder import SOURCE_FILE
from megasft.errors import ConversionError

ORIGIN: Final = ".export.json"
_NOT_EXPORTED: Final = (ORIGIN, MANIFEST, SOURCE_FILE)


def write(folder: Path, *, output: Path, checkpoint: Path, source: str) -> None:
    """Write the file as the last one of a folder.

    Args:
        folder: Under its temporary name.
        output: The name it will get.
        checkpoint: What ``--save`` named.
        source: Digest of what the folder is made from.
    """
    content = {
        "checkpoint": _relative(checkpoint, output),
        "source": source,
        "files": _files(folder),
    }
    (folder / ORIGIN).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def digest(source: Mapping[str, Any]) -> str:
    """Return hexadecimal digits that change when what a folder is made from does."""
    return hashlib.sha256(orjson.dumps(source, option=orjson.OPT_SORT_KEYS)).hexdigest()


def is_of(output: Path, source: str) -> bool:
    """Say whether a folder was made from just this."""
    return _read(output).get("source") == source


def foreign(output: Path, checkpoint: Path) -> str | None:
    """Return why a folder must not be replaced by an export of a checkpoint, None when it may.

    Example:
        >>> foreign(Path("/nowhere"), Path("/ckpt")) is None
        True
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    origin = _read(output)
    if not origin:
        return "was not exported from a checkpoint"
    if origin.get("checkpoint") != _relative(checkpoint, output):
        return f"was exported from another checkpoint, {origin.get('checkpoint')} beside it"
    before, now = origin.get("files", {}), _files(output)
    changed = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    if changed:
        return f"has files that were added, removed or changed since: {', '.join(changed[:5])}"
    return None


def require_own(output: Path, checkpoint: Path) -> None:
    """Check that a folder may be replaced by an export of a checkpoint.

    Raises:
        ConversionError: It was made from something else, or changed by hand.
    """
    if (reason := foreign(output, checkpoint)) is not None:
        raise ConversionError(
            f"{output} exists and {reason}, so --update does not replace it; move it away, or "
            "choose another --output"
        )


def _relative(checkpoint: Path, output: Path) -> str:
    return os.path.relpath(checkpoint.resolve(), output.parent.resolve())


def _files(folder: Path) -> dict[str, list[int]]:
    """Return size and time (ns) of each file; a rename of the folder changes neither."""
    return {
        str(path.relative_to(folder)): [(stat := path.stat()).st_size, stat.st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and str(path.relative_to(folder)) not in _NOT_EXPORTED
    }


def _read(output: Path) -> dict[str, Any]:
    try:
        content = orjson.loads((output / ORIGIN).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
