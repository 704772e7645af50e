"""Several token stores read as one, and what a mixture may draw from them.

The result is a ``TokenStore`` like any other, so rows, training, ``trace`` and the reports need not
know of it. Everything stays in the memory maps of its stores, and categories are renumbered in the
records that are read. Only the length of each sample is copied: 8 bytes a sample and process.

Ids are comparable only between stores of one tokenizer, so others are refused. Categories are one
by name: of each store but the first, a category takes the id its name has already, else its own,
else the smallest that no store uses; the last case is logged, because a mixture may name the old
id.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from megasft.draw import Population
from megasft.errors import StoreError
from megasft.schema import NO_CATEGORY, TURN_FIELDS
from megasft.sequence_file import FlatSequences, Integers, Numbers, Sequences, cut, offsets_of
from megasft.store import Lineage, TokenStore, open_store
from megasft.turn_records import WeightRange

_CATEGORY: Final = TURN_FIELDS.index("category_id")


@dataclass(frozen=True, slots=True)
class _Renumbered:
    """Turn records of a store, whose categories get other ids as they are read.

    Attributes:
        file: The records.
        old_ids: int32, ascending. Ids of categories in the store.
        new_ids: int32. What each becomes; an id that is not among the old ones stays.
    """

    file: FlatSequences
    old_ids: npt.NDArray[np.int32]
    new_ids: npt.NDArray[np.int32]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return self.file.lengths

    @property
    def offsets(self) -> Numbers:
        return self.file.offsets

    @property
    def values(self) -> Integers:
        return self._renumber(np.array(self.file.values, np.int32))

    def __getitem__(self, index: int) -> Integers:
        return self._renumber(np.array(self.file[index], np.int32))

    def views(self, numbers: Numbers) -> list[Integers]:
        records = self.file.views(numbers)
        if not records:
            return []
        flat = np.concatenate(records, dtype=np.int32, casting="same_kind")
        return cut(self._renumber(flat), [len(record) for record in records])

    def _renumber(self, flat: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Write the new ids over the old ones, in records of our own."""
        ids = flat.reshape(-1, len(TURN_FIELDS))[:, _CATEGORY]
        place = np.searchsorted(self.old_ids, ids).clip(max=len(self.old_ids) - 1)
        known = self.old_ids[place] == ids
        ids[known] = self.new_ids[place[known]]
        return flat


@dataclass(frozen=True, slots=True)
class _Joined:
    """Sequences of several files, numbered through.

    Attributes:
        files: Where they are.
        starts: int64 [files + 1]. Number of the first sequence of each file.
        lengths: int32 [S]. Elements of each sequence.
    """

    files: tuple[Sequences, ...]
    starts: Numbers
    lengths: npt.NDArray[np.int32]

    def __getitem__(self, index: int) -> Integers:
        if not 0 <= index < self.starts[-1]:
            raise IndexError(index)
        file = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.files[file][index - int(self.starts[file])]

    def views(self, numbers: Numbers) -> list[Integers]:
        found: dict[int, Integers] = {}
        file_of = np.searchsorted(self.starts, numbers, "right") - 1
        for file in np.unique(file_of).tolist():
            places = np.flatnonzero(file_of == file)
            views = self.files[file].views(numbers[places] - self.starts[file])
            found.update(zip(places.tolist(), views, strict=True))
        return [found[place] for place in range(len(numbers))]


@dataclass(frozen=True, slots=True)
class _JoinedTurns:
    """Turn records of several stores, also end to end, which is made anew whenever asked for.

    Attributes:
        files: Records of each store.
        joined: The same, numbered through.
    """

    files: tuple[FlatSequences, ...]
    joined: _Joined

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return self.joined.lengths

    @property
    def offsets(self) -> Numbers:
        return offsets_of(self.lengths)

    @property
    def values(self) -> Integers:
        return np.concatenate([file.values for file in self.files])

    def __getitem__(self, index: int) -> Integers:
        return self.joined[index]

    def views(self, numbers: Numbers) -> list[Integers]:
        return self.joined.views(numbers)


def open_stores(paths: Sequence[Path | str]) -> TokenStore:
    """Open one store, or several as one.

    Args:
        paths: Folders of stores, at least one; samples are numbered in this order.

    Returns:
        The store; of several, ``meta["warnings"]`` says in sentences what differs between them.

    Raises:
        StoreError: One is missing or damaged, is named twice, or has another tokenizer.
    """
    twice = [path for path, n in Counter(Path(p).resolve() for p in paths).items() if n > 1]
    if twice:
        raise StoreError(
            f"{twice[0]} is named twice; name it once, and repeat its samples with a mixture "
            "(sample_rate: 2)"
        )
    stores = [open_store(path) for path in paths]
    if len(stores) == 1:
        return stores[0]
    warnings = [w for store in stores[1:] for w in _compare_tokenizers(stores[0], store)]
    names, renumbered = _one_numbering([store.meta.get("categories", {}) for store in stores])
    renamed = _renamed(stores, names, renumbered)
    weights = [store.weights or WeightRange(0, 1.0, 1.0) for store in stores]
    return TokenStore(
        stores[0].path,
        _meta(stores, names, renumbered) | {"warnings": [*warnings, *renamed]},
        _joined([store.tokens for store in stores]),
        _turns(stores, renumbered),
        _lineages(stores),
        reduce(WeightRange.joined, weights) if any(store.weights for store in stores) else None,
    )


def population_of(store: TokenStore) -> Population:
    """Return what a mixture may draw: each sample with its source and category.

    A sample has the category of its first turn; one without turns has none.
    """
    width = len(TURN_FIELDS)
    starts = store.turns.offsets[:-1] // width
    has_turn = store.turns.lengths > 0
    categories = np.full(len(store), NO_CATEGORY, np.int32)
    records = store.turns.values.reshape(-1, width)
    categories[has_turn] = records[starts[has_turn], _CATEGORY]
    sources = [
        (source["path"], source.get("store", str(store.path))) for source in store.meta["sources"]
    ]
    names = {int(i): str(name) for i, name in store.meta.get("categories", {}).items()}
    return Population(np.asarray(store.lineage[:, 0]), categories, sources, names)


def _compare_tokenizers(first: TokenStore, other: TokenStore) -> list[str]:
    """Refuse another tokenizer, and return a warning of another chat template."""
    facts = (
        ("vocabulary size", [store.meta["vocab_size"] for store in (first, other)]),
        ("tokenizer", [_tokenizer(store, "sha256") for store in (first, other)]),
    )
    for name, (ours, theirs) in facts:
        if ours != theirs:
            raise StoreError(
                f"{first.path} and {other.path} differ in {name} ({ours} and {theirs}), so an id "
                "is not the same token in both; build them with one tokenizer"
            )
    templates = [_tokenizer(store, "chat_template_sha256") for store in (first, other)]
    if templates[0] == templates[1]:
        return []
    return [
        f"{first.path} and {other.path} were rendered with different chat templates; the model "
        "learns both"
    ]


def _tokenizer(store: TokenStore, fact: str) -> Any:
    return store.meta.get("tokenizer", {}).get(fact)


def _one_numbering(
    categories: Sequence[Mapping[str, str]],
) -> tuple[dict[int, str], list[dict[int, int]]]:
    """Return the names of all categories, and what each store's ids become.

    Example:
        >>> _one_numbering([{"1": "a"}, {"1": "b", "2": "a"}])
        ({1: 'a', 3: 'b'}, [{1: 1}, {1: 3, 2: 1}])
    """
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    renumbered = []
    reserved = {int(i) for of_store in categories for i in of_store}
    for of_store in categories:
        new = {}
        for old, name in of_store.items():
            number = ids.get(name)
            if number is None:
                number = int(old) if int(old) not in names else _free(names, reserved)
            names[number], ids[name], new[int(old)] = name, number, number
        renumbered.append(new)
    return dict(sorted(names.items())), renumbered


def _free(names: Mapping[int, str], reserved: set[int]) -> int:
    number = NO_CATEGORY + 1
    while number in names or number in reserved:
        number += 1
    return number


def _joined(files: Sequence[Sequences]) -> _Joined:
    counts = [len(file.lengths) for file in files]
    return _Joined(
        tuple(files), offsets_of(np.array(counts)), np.concatenate([file.lengths for file in files])
    )


def _turns(stores: Sequence[TokenStore], renumbered: Sequence[Mapping[int, int]]) -> _JoinedTurns:
    files: list[FlatSequences] = []
    for store, new in zip(stores, renumbered, strict=True):
        moved = sorted((old, number) for old, number in new.items() if old != number)
        old_ids, new_ids = (np.array([pair[k] for pair in moved], np.int32) for k in (0, 1))
        files.append(_Renumbered(store.turns, old_ids, new_ids) if moved else store.turns)
    return _JoinedTurns(tuple(files), _joined(files))


def _lineages(stores: Sequence[TokenStore]) -> tuple[Lineage, ...]:
    numbers = offsets_of(np.array([len(store.meta["sources"]) for store in stores]))
    return tuple(
        Lineage(store.lineage, first)
        for store, first in zip(stores, numbers[:-1].tolist(), strict=True)
    )


def _meta(
    stores: Sequence[TokenStore],
    names: Mapping[int, str],
    renumbered: Sequence[Mapping[int, int]],
) -> dict[str, Any]:
    prints = [
        [store.fingerprint, sorted(new.items())]
        for store, new in zip(stores, renumbered, strict=True)
    ]
    ends = {i for store in stores for i in store.meta["special_tokens"].get("end_of_turn", [])}
    return {
        **stores[0].meta,
        "fingerprint": hashlib.sha256(orjson.dumps(prints)).hexdigest()[:32],
        "stores": [str(store.path) for store in stores],
        "special_tokens": {**stores[0].meta["special_tokens"], "end_of_turn": sorted(ends)},
        "categories": {str(i): name for i, name in names.items()},
        "counts": _sums([store.meta["counts"] for store in stores]),
        "sources": [
            {**source, "store": str(store.path)}
            for store in stores
            for source in store.meta["sources"]
        ],
    }


def _renamed(
    stores: Sequence[TokenStore],
    names: Mapping[int, str],
    renumbered: Sequence[Mapping[int, int]],
) -> list[str]:
    """Return a warning of each category that is called by another number here."""
    return [
        f"category {old} ({names[number]}) of {store.path} is {number} here; name it by its name "
        "in a mixture"
        for store, new in zip(stores, renumbered, strict=True)
        for old, number in new.items()
        if old != number
    ]


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up counts key by key, those by reason too."""
    total: dict[str, Any] = {}
    for of_store in counts:
        for key, value in of_store.items():
            if isinstance(value, Mapping):
                total[key] = _sums([total.get(key, {}), value])
            elif isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return total
