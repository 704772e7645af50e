"""Datasets by name, ``hub:openai/gsm8k/main[train]@REVISION``, as the files they become here.

The package `datasets` (extra ``megasft[data]``, imported here alone) downloads and prepares; what
it leaves in its cache are Arrow files, which are read like any table, rows in order. Configuration,
split and revision may be left out, but of several splits none is chosen unasked. Parts of a split
(``train[:10%]``) are refused: a cached file holds the split whole, and mixtures take parts. What a
store keeps names the very commit, so that it can be built again from that name. A folder of this
machine, ``hub:./chats[train]``, is split by that library's rules for the names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from megasft.data.remote import Remote, local_file
from megasft.errors import DataError

PREFIX: Final = "hub:"
_NAME: Final = re.compile(
    r"hub:(?P<path>[^\[\]@]+)(\[(?P<split>\w+(\.\w+)*)\])?(@(?P<revision>[^\s\[\]@]+))?"
)
_LOCAL: Final = (".", "/", "~")
_SYNTAX: Final = "hub:OWNER/NAME[SPLIT], or hub:OWNER/NAME/CONFIG[SPLIT]@REVISION"


class DatasetName(NamedTuple):
    """What the parts of a name mean; None leaves the choice to the dataset."""

    path: str
    config: str | None
    split: str | None
    revision: str | None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.path.startswith(_LOCAL)


def is_dataset(text: str) -> bool:
    """Say whether an input names a dataset."""
    return text.startswith(PREFIX)


def parse_name(text: str) -> DatasetName:
    """Take a name apart.

    Raises:
        DataError: It does not follow the syntax.

    Example:
        >>> tuple(parse_name("hub:openai/gsm8k/main[train]@v1"))
        ('openai/gsm8k', 'main', 'train', 'v1')
    """
    found = _NAME.fullmatch(text)
    parts = found["path"].split("/") if found else []
    is_local = text.removeprefix(PREFIX).startswith(_LOCAL)
    if found and is_local and not found["revision"]:
        return DatasetName(found["path"], None, found["split"], None)
    if not found or is_local or not 1 <= len(parts) <= 3 or not all(parts):
        raise DataError(
            f"{text} is not the name of a dataset; write {_SYNTAX}, with one whole split such as "
            "train, or hub:./FOLDER[SPLIT] for a folder of this machine"
        )
    config = parts[2] if len(parts) == 3 else None
    return DatasetName("/".join(parts[:2]), config, found["split"], found["revision"])


def title_of_dataset(shown: str) -> str:
    """Return the short name of a dataset, as its files are shown.

    Example:
        >>> title_of_dataset("hub:openai/gsm8k/main[train]@v1/gsm8k-train-00001-of-00002.arrow")
        'gsm8k'
    """
    name = parse_name(shown.partition("]")[0] + "]")
    if name.is_local:
        return Path(name.path).expanduser().resolve().name
    return name.path.split("/")[-1]


def files_of_dataset(text: str) -> list[Remote]:
    """Download and prepare a dataset, unless its cache has it, and return its files.

    Raises:
        DataError: It cannot be reached, or has several splits and none was chosen.
    """
    name = parse_name(text)
    datasets = _import_datasets(text)
    path = str(Path(name.path).expanduser()) if name.is_local else name.path
    if name.is_local and not Path(path).is_dir():  # else it would be looked for on the hub
        raise DataError(f"{text}: {path} is no folder of this machine; check the path")
    with _named(text, datasets):
        builder = datasets.load_dataset_builder(path, name.config, revision=name.revision)
        # Known before anything large is downloaded, unless the dataset is a stream of its own kind.
        if known := list(builder.info.splits or builder.config.data_files or ()):
            _chosen_split(name, text, known)
        builder.download_and_prepare()
        split = _chosen_split(name, text, list(builder.info.splits))
        cached = [item["filename"] for item in builder.as_dataset(split=split).cache_files]
    shown = _shown(name, split, str(builder.hash))
    if len(cached) == 1:
        return [local_file(shown, cached[0])]
    return [local_file(f"{shown}/{Path(file).name}", file) for file in cached]


def _chosen_split(name: DatasetName, text: str, splits: list[str]) -> str:
    splits = [str(split) for split in splits]
    if name.split in splits:
        return name.split
    if name.split is None and len(splits) == 1:
        return splits[0]
    fault = f"has no split {name.split}" if name.split else "names no split"
    example = _shown(name, splits[0], name.revision or "")
    raise DataError(
        f"{text} {fault}, and the dataset has {len(splits)} ({', '.join(splits)}); choose one, "
        f"such as --input '{example}'"
    )


def _shown(name: DatasetName, split: str, revision: str) -> str:
    config = f"/{name.config}" if name.config else ""
    commit = f"@{revision}" if revision and not name.is_local else ""
    return f"{PREFIX}{name.path}{config}[{split}]{commit}"


def _import_datasets(text: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{text} is a dataset, and the Python package datasets is not installed; "
            "pip install 'megasft[data]', or download the files and name them"
        ) from None
    return datasets


@contextmanager
def _named(text: str, datasets: Any) -> Iterator[None]:
    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        remedy = "check the name, and log in with `hf auth login` if it is gated"
        if datasets.config.HF_HUB_OFFLINE:
            remedy = "HF_HUB_OFFLINE is set: unset it, or fill the cache where there is a network"
        raise DataError(
            f"{text} cannot be loaded: {error}; {remedy}, or download the files and name them"
        ) from error
