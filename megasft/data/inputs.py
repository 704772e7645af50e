"""Which files an ``--input`` means: a file, a folder, a glob, a URL, or the name of a dataset.

Whatever was asked for becomes a sorted list of files, so that the same inputs give the same store
on every machine. A folder, here or in an object store, is searched to its bottom for the suffixes
below; a folder written by ``datasets.save_to_disk`` is its data files in the order its own
state.json names. Where there are several splits to choose from, be it by that library's files or
by file names like train.json and eval.json, the folder is refused: joining a train and a test
split unasked would be the worse surprise. Files that were named, or matched by a glob, are taken.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import orjson

from megasft.data.hub import files_of_dataset, is_dataset, title_of_dataset
from megasft.data.remote import Location, Remote, is_glob, is_url, list_files, without_secrets
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
_TRAIN_WORDS: Final = {"train", "training"}
_VALID_WORDS: Final = {"eval", "evaluation", "dev", "val", "valid", "validation"}
_HELD_OUT_WORDS: Final = {"test", "testing", *_VALID_WORDS}


class SeveralSplitsError(DataError):
    """A folder holds files of training and others that are held out.

    Attributes:
        train: Names of the first, in the folder.
        valid: Names of the others; none if any of them is of a test split.
    """

    def __init__(self, message: str, train: list[str], valid: list[str]) -> None:
        super().__init__(message)
        self.train, self.valid = train, valid


def find_files(inputs: Iterable[str | Location]) -> list[Location]:
    """Return the files all inputs mean: the inputs in their order, each one's files sorted.

    A path that is not there is returned as it is, for whoever opens it to complain about. What
    was found before is found again without asking its server.

    Raises:
        DataError: A folder holds no data, a glob matches nothing, splits must be chosen from, or
            a URL or a dataset cannot be reached.
    """
    return [file for item in inputs for file in _files_of(item)]


def find_splits(inputs: Sequence[str]) -> tuple[list[Location], list[Location]]:
    """Return the files to train on and those to validate on, found by name in one folder.

    Raises:
        DataError: As ``find_files`` does; a test split is no validation split.
    """
    try:
        return find_files(inputs), []
    except SeveralSplitsError as error:
        if len(inputs) > 1 or not error.valid or not Path(inputs[0]).is_dir():
            raise
        folder = Path(inputs[0])
        return [folder / name for name in error.train], [folder / name for name in error.valid]


def category_of(file: Location) -> str:
    """Return the name a file gives to its conversations.

    Example:
        >>> category_of(Path("data/maths.jsonl.gz"))
        'maths'
    """
    if is_dataset(str(file)):
        return title_of_dataset(str(file))
    if isinstance(file, Path) and (file.parent / _STATE).is_file():
        return file.parent.resolve().name  # every data file of `datasets` is called data-00000-...
    suffix = max((s for s in SUFFIXES if file.name.endswith(s)), key=len, default="")
    return file.name.removesuffix(suffix or PurePosixPath(file.name).suffix) or file.name


def _files_of(item: str | Location) -> list[Location]:
    if isinstance(item, Remote):
        return [item]
    if isinstance(item, str) and is_dataset(item):
        return [*files_of_dataset(item)]
    if isinstance(item, str) and is_url(item):
        return _files_at(item)
    path = Path(item)
    if path.is_dir():
        return _files_in(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f"{path} matches no file (0 of it); check the pattern, or name the files")
    return find_files(Path(match) for match in matches)


def _files_in(path: Path) -> list[Location]:
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    folder = _Folder(str(path), set(names), lambda name: (path / name).read_bytes())
    return [path / name for name in _data_of(folder)]


def _files_at(url: str) -> list[Location]:
    found = list_files(url)
    if isinstance(found, Remote):
        return [found]
    if is_glob(url):
        return [*found.values()]
    folder = _Folder(without_secrets(url), set(found), lambda name: found[name].read_bytes())
    return [found[name] for name in _data_of(folder)]


class _Folder(NamedTuple):
    """All files under a folder by their name in it, with ``/``, wherever it lies."""

    shown: str
    names: set[str]
    read: Callable[[str], bytes]

    def place(self, name: str) -> str:
        return f"{self.shown.rstrip('/')}/{name}".rstrip("/")


def _data_of(folder: _Folder, inside: str = "") -> list[str]:
    if inside + _SPLITS in folder.names:
        splits = [str(name) for name in _json(folder, inside + _SPLITS).get("splits", [])]
        if len(splits) != 1:
            raise DataError(
                f"{folder.place(inside)} holds {len(splits)} splits ({', '.join(splits)}); name "
                f"the ones to build, such as --input {folder.place(inside + 'train')}"
            )
        return _data_of(folder, f"{inside}{splits[0]}/")
    if inside + _STATE in folder.names:
        listed = _json(folder, inside + _STATE).get("_data_files", [])
        return [inside + item["filename"] for item in listed]
    found = [name for name in folder.names if name.startswith(inside) and _is_data(name, folder)]
    if not found:
        raise DataError(
            f"{folder.place(inside)} holds no data file (0 conversations); files that end in "
            f"{', '.join(SUFFIXES)} are looked for, any other must be named"
        )
    found.sort(key=lambda name: name.split("/"))
    _require_one_split(folder, found)
    return found


def _is_data(name: str, folder: _Folder) -> bool:
    parents, _, last = name.rpartition("/")
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    is_named_like_data = last.endswith(SUFFIXES) and last not in _NOT_DATA
    is_beside_state = f"{parents}/{_STATE}".removeprefix("/") in folder.names
    return (
        is_named_like_data and not is_hidden and not (is_beside_state and last.startswith("cache-"))
    )


def _require_one_split(folder: _Folder, names: list[str]) -> None:
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    train = [name for name in names if words[name] & _TRAIN_WORDS]
    held_out = [name for name in names if words[name] & _HELD_OUT_WORDS and name not in train]
    if train and held_out:
        is_valid = all(words[name] & _VALID_WORDS for name in held_out)
        is_all = is_valid and len(train) + len(held_out) == len(names)
        raise SeveralSplitsError(
            f"{folder.shown} holds several splits: {len(train)} of training, such as {train[0]}, "
            f"and {len(held_out)} held out, such as {held_out[0]}; name the files to build, such "
            f"as --input {folder.place(train[0])}",
            train,
            held_out if is_all else [],
        )


def _json(folder: _Folder, name: str) -> dict[str, Any]:
    try:
        found = orjson.loads(folder.read(name))
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(
            f"{folder.place(name)} cannot be read: {error}; save the dataset again"
        ) from None
    return found if isinstance(found, dict) else {}
