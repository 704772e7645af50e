"""The record of a verification: what was compared, with which programs, and what came of it."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import orjson

from checkpoint_convert.verify.side_files import digests
from checkpoint_convert.verify.tensors import Fingerprint
from checkpoint_convert.verify.verification import Verification
from megasft.errors import ConversionError

VERSION: Final = 1
"""Of the format."""

PACKAGES: Final = ("megasft", "torch", "megatron-core", "transformers", "safetensors")


def write(
    paths: Sequence[Path],
    verification: Verification,
    tensors: Mapping[str, Fingerprint],
    *,
    hf: Path,
) -> None:
    """Write the manifest, as it is named in each place.

    Args:
        paths: Files to write.
        verification: Checks and figures.
        tensors: Of the folder that is the truth, by name.
        hf: Where that folder is now.

    Raises:
        ConversionError: A file cannot be written.
    """
    content = orjson.dumps(
        _content(verification, tensors, hf), option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    )
    for path in paths:
        unfinished = path.with_name(path.name + ".tmp")
        try:
            unfinished.write_bytes(content + b"\n")
            unfinished.replace(path)
        except OSError as error:
            raise ConversionError(
                f"{path} cannot be written ({error}); name another place with --manifest"
            ) from error


def _content(
    verification: Verification, tensors: Mapping[str, Fingerprint], hf: Path
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        **verification.as_dict(),
        "files": digests(hf),
        "tensors": {name: tensors[name]._asdict() for name in sorted(tensors)},
    }
