"""Which files an ``--input`` means: a file, a folder, a glob, or what ``save_to_disk`` wrote.

Whatever was asked for becomes a sorted list of files, so that the same inputs give the same store
on every machine. A folder is searched to its bottom for the suffixes below; a folder written by
``datasets.save_to_disk`` is its data files in the order its own state.json names, and one with
several splits is refused: joining a train and a test split unasked would be the worse surprise.
Names on the hub are not resolved: a build reads what lies on this machine, and hashes it.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.errors import DataError

TEXT_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES: Final = (".parquet", ".arrow", ".feather")
SUFFIXES: Final = (
    *(text + packed for text in TEXT_SUFFIXES for packed in ("", ".gz", ".zst")),
    *TABLE_SUFFIXES,
)
"""What is taken from a folder; a file named by itself may be called anything."""

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NOT_DATA: Final = {_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json"}


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files all inputs mean: the inputs in their order, each one's files sorted.

    A path that is not there is returned as it is, for whoever opens it to complain about.

    Raises:
        DataError: A folder holds no data, a glob matches nothing, or splits must be chosen from.
    """
    return [file for path in inputs for file in _files_of(path)]


def category_of(file: Path) -> str:
    """Return the name a file gives to its conversations.

    Example:
        >>> category_of(Path("data/maths.jsonl.gz"))
        'maths'
    """
    if (file.parent / _STATE).is_file():
        return file.parent.resolve().name  # every data file of `datasets` is called data-00000-...
    suffix = max((s for s in SUFFIXES if file.name.endswith(s)), key=len, default=file.suffix)
    return file.name.removesuffix(suffix) or file.name


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_in(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f"{path} matches no file (0 of it); check the pattern, or name the files")
    return find_files(Path(match) for match in matches)


def _files_in(folder: Path) -> list[Path]:
    if (folder / _SPLITS).is_file():
        splits = [str(name) for name in _json(folder / _SPLITS).get("splits", [])]
        if len(splits) != 1:
            raise DataError(
                f"{folder} holds {len(splits)} splits ({', '.join(splits)}); name the ones to "
                f"build, such as --input {folder / (splits or ['train'])[0]}"
            )
        return _files_in(folder / splits[0])
    if (folder / _STATE).is_file():
        listed = _json(folder / _STATE).get("_data_files", [])
        return [folder / item["filename"] for item in listed]
    found = [file for file in folder.rglob("*") if _is_data(file, folder)]
    if not found:
        raise DataError(
            f"{folder} holds no data file (0 conversations); files that end in "
            f"{', '.join(SUFFIXES)} are looked for, any other must be named"
        )
    return sorted(found)


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_named_like_data = file.name.endswith(SUFFIXES) and file.name not in _NOT_DATA
    is_cache = file.name.startswith("cache-") and (file.parent / _STATE).is_file()
    return is_named_like_data and not is_hidden and not is_cache and file.is_file()


def _json(file: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; save the dataset again") from None
    return found if isinstance(found, dict) else {}
