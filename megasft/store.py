"""The token store: what its bytes mean, how it is written and how it is read.

A store is a directory that is either whole or refused:

    tokens.bin/.idx   token ids, one sequence per sample, document order; Megatron's IndexedDataset
                      format (uint16 below 65,500 ids, else int32), so stock Megatron can read it
    turns.bin/.idx    one int32 sequence per sample: its turn records (schema.TURN_FIELDS), flat
                      (format version 2; version 1 has no weights and is read as weights of 1)
    lineage.npy       int64 [S, 2]: source file (position in store.json) and line of each sample
    store.json        everything else, written last

Writing goes to ``<name>.partial`` and ends in one rename: a build that dies leaves a ``.partial``
folder which no reader accepts and the next build replaces. Everything is memory-mapped when read,
the indices too (``sequence_file.py``), so opening costs the same for any number of samples.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import orjson

from megasft.errors import StoreError
from megasft.schema import TURN_FIELDS, Sample
from megasft.sequence_file import (
    FlatSequences,
    Sequences,
    SequenceWriter,
    close_synced,
    open_sequences,
)
from megasft.sequence_file import SequenceFile as SequenceFile  # readers know it from here
from megasft.turn_records import WIDTHS, UnitWeights, WeightRange, range_in, range_of

FORMAT_VERSION: Final = 2
"""What is written; the versions of ``WIDTHS`` are read."""
TOKENS, TURNS, LINEAGE, META = "tokens", "turns", "lineage.npy", "store.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype Megatron itself would choose for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class StoreWriter:
    """Writes a store next to its final place and renames it when it is whole.

    Use as a context manager; leaving it by an exception keeps the ``.partial`` folder, which no
    reader accepts.

    Example:
        >>> with StoreWriter(Path("out"), vocab_size=32_000) as writer:   # doctest: +SKIP
        ...     writer.add(sample, source=0, line=17)
        ...     writer.finish({"counts": {...}, "tokenizer": {...}})
    """

    def __init__(self, path: Path, *, vocab_size: int, overwrite: bool = False) -> None:
        self.path, self._overwrite = path, overwrite
        self.partial = path.with_name(path.name + ".partial")
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.partial.with_name(self.partial.name + ".lock"))
        try:
            _require_replaceable(path, overwrite=overwrite)
        except StoreError:
            self._unlock()
            raise
        self.restarted = self.partial.exists()
        if self.restarted:
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        self._tokens = SequenceWriter(self.partial / TOKENS, token_dtype(vocab_size))
        self._turns = SequenceWriter(self.partial / TURNS, np.dtype("<i4"))
        self._lineage = array("q")
        self._vocab_size = vocab_size
        self._finished = False

    def add(self, sample: Sample, *, source: int, line: int) -> None:
        """Append a sample.

        Args:
            sample: Its turns ascend, do not overlap and lie in ``[1, len(tokens)]``.
            source: Position of its file in the ``sources`` of store.json.
            line: Line (or record) of that file, counted from 1.

        Raises:
            StoreError: It cannot be written, because the disk is full for one; nothing is left.
        """
        assert sample.turns.shape[1] == len(TURN_FIELDS), "a turn record has its weight"
        try:
            self._tokens.add(sample.tokens)
            self._turns.add(sample.turns.reshape(-1))
        except OSError as error:
            raise self._unwritable(error) from None
        self._lineage.extend((source, line))

    def finish(self, meta: dict[str, Any]) -> None:
        """Write store.json last, make everything durable, and rename the folder into place.

        Args:
            meta: Facts for store.json (tokenizer, special tokens, categories, counts, sources).

        Raises:
            StoreError: It cannot be written, because the disk is full for one; nothing is left.
        """
        try:
            self._write_rest(meta)
        except OSError as error:
            raise self._unwritable(error) from None
        self._rename_into_place()
        self._finished = True

    def _write_rest(self, meta: dict[str, Any]) -> None:
        self._tokens.close()
        self._turns.close()
        lineage = np.frombuffer(self._lineage, dtype=np.int64).reshape(-1, 2)
        with (self.partial / LINEAGE).open("wb") as file:
            np.save(file, lineage)
            close_synced(file)
        digest = hashlib.sha256(self._tokens.digest.digest() + self._turns.digest.digest())
        records = open_sequences(self.partial / TURNS).values.reshape(-1, len(TURN_FIELDS))
        weights = range_of(records)
        whole = {
            "format_version": FORMAT_VERSION,
            "fingerprint": digest.hexdigest()[:32],
            "turn_fields": list(TURN_FIELDS),
            "vocab_size": self._vocab_size,
            **meta,
            "turn_weights": None if weights is None else weights._asdict(),
        }
        with (self.partial / META).open("wb") as file:
            file.write(orjson.dumps(whole, option=orjson.OPT_INDENT_2) + b"\n")
            close_synced(file)

    def _unwritable(self, error: OSError) -> StoreError:
        self._tokens.abandon()
        self._turns.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)  # it would keep the disk full
        return StoreError(
            f"{self.partial} cannot be written: {error.strerror or error}, after "
            f"{len(self._lineage) // 2:,} samples; free space there, or choose another --output"
        )

    def _rename_into_place(self) -> None:
        replaced = self.path.with_name(self.path.name + ".replaced")
        if replaced.exists():
            shutil.rmtree(replaced)
        if self._overwrite and self.path.exists():
            self.path.rename(replaced)
        self.partial.rename(self.path)
        if replaced.exists():
            shutil.rmtree(replaced)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self._tokens.abandon()
            self._turns.abandon()
        self._unlock()

    def _unlock(self) -> None:
        self.partial.with_name(self.partial.name + ".lock").unlink(missing_ok=True)
        os.close(self._lock)


def _require_replaceable(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise StoreError(f"{path} exists already; pass --overwrite to replace it")
    if path.exists() and not (path / META).is_file():
        raise StoreError(
            f"{path} exists and is not a token store; it is not replaced, move it away"
        )


def _lock(path: Path) -> int:
    """Take the build lock; the kernel frees it when the process dies, however it dies."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StoreError(
                f"another build is writing {path.name.removesuffix('.partial.lock')} right now; "
                "wait for it, or choose another --output"
            ) from None
        # The build before may have removed the file between our two calls: lock the one that lasts.
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
        os.close(handle)


class Samples(NamedTuple):
    """Several samples, their turns end to end.

    Attributes:
        tokens: Token ids of each, as the store has them.
        turns: int32 [N, 5]. Turn records of all, see ``TURN_FIELDS``.
        num_turns: int64 [S]. Turns of each.
    """

    tokens: Sequence[npt.NDArray[np.integer[Any]]]
    turns: npt.NDArray[np.int32]
    num_turns: npt.NDArray[np.int64]


class Lineage(NamedTuple):
    """Where the samples of one store were made from.

    Attributes:
        places: int64 [S, 2]. Source file, counted within the store, and line of each sample.
        first_source: Sources of the stores before it, where several are read as one.
    """

    places: npt.NDArray[np.int64]
    first_source: int


@dataclass(frozen=True, slots=True)
class TokenStore:
    """A whole store, memory-mapped; opening it reads only headers.

    Several stores read as one (``store_group.py``) are a TokenStore too.

    Attributes:
        path: Its folder; of several stores, that of the first.
        meta: Contents of store.json.
        tokens: Token ids of each sample.
        turns: Flat turn records of each sample.
        lineages: Origin of the samples, store by store.
        weights: Range of the turns' weights; None where every turn weighs 1.
        ignores_weights: Turns are read as if each weighed 1.
    """

    path: Path
    meta: dict[str, Any]
    tokens: Sequences
    turns: FlatSequences
    lineages: tuple[Lineage, ...]
    weights: WeightRange | None = None
    ignores_weights: bool = False

    def __len__(self) -> int:
        return len(self.tokens.lengths)

    @property
    def lineage(self) -> npt.NDArray[np.int64]:
        """int64 [S, 2]. Source file and line of each sample; of several stores, made when asked."""
        parts = [
            places if not first else places + np.array([first, 0])
            for places, first in self.lineages
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def name(self) -> str:
        """What messages call it: its folder, or all of them."""
        return " + ".join(self.meta.get("stores", [str(self.path)]))

    @property
    def has_weights(self) -> bool:
        """Whether a turn is read with a weight other than 1."""
        return self.weights is not None and not self.ignores_weights

    @property
    def fingerprint(self) -> str:
        """Hash of all token ids and turn records; a plan made for another one is refused."""
        return str(self.meta["fingerprint"])

    def sample(self, index: int) -> Sample:
        """Return one sample; its arrays view the memory map where the dtype allows."""
        return Sample(
            np.asarray(self.tokens[index], dtype=np.int32),
            np.asarray(self.turns[index], dtype=np.int32).reshape(-1, len(TURN_FIELDS)),
        )

    def samples(self, indices: npt.NDArray[np.integer[Any]]) -> Samples:
        """Return several samples at once; their tokens view the memory map.

        Args:
            indices: int [S]. Their numbers in the store; any order, repeats allowed.
        """
        numbers = np.asarray(indices, np.int64)
        records = self.turns.views(numbers)
        flat = np.concatenate(records) if records else np.zeros(0, np.int32)
        width = len(TURN_FIELDS)
        return Samples(
            self.tokens.views(numbers),
            np.asarray(flat, np.int32).reshape(-1, width),
            self.turns.lengths[numbers].astype(np.int64) // width,
        )

    def without_weights(self) -> TokenStore:
        """Return the store with every turn's weight read as 1."""
        return replace(self, turns=UnitWeights(self.turns), ignores_weights=True)

    def source_line(self, index: int) -> str:
        """Return ``file:17`` (or ``file:record 17``) of the conversation a sample was made from."""
        part, place = 0, index
        while place >= len(self.lineages[part].places):
            place -= len(self.lineages[part].places)
            part += 1
        number, line = (int(x) for x in self.lineages[part].places[place])
        source = self.meta["sources"][number + self.lineages[part].first_source]
        has_lines = source.get("kind", "jsonl") == "jsonl"
        return f"{source['path']}:{'' if has_lines else 'record '}{line}"


def open_store(path: Path | str) -> TokenStore:
    """Open a store, or say what is wrong with it.

    Raises:
        StoreError: It is missing, half-written, of another format version, or its files do not
            have the sizes its index promises.
    """
    path = Path(path)
    if not (path / META).is_file():
        partial = path.with_name(path.name + ".partial")
        if path.name.endswith(".partial") or (partial.exists() and not path.exists()):
            raise StoreError(
                f"{path} is half-written: its build did not finish; run `megasft build` again"
            )
        raise StoreError(f"{path} is not a token store (no {META}); make one with `megasft build`")
    meta = orjson.loads((path / META).read_bytes())
    width = WIDTHS.get(meta.get("format_version"))
    if width is None:
        raise StoreError(
            f"{path} has format version {meta.get('format_version')}, this megasft reads "
            f"{' and '.join(map(str, WIDTHS))}; build the store again"
        )
    tokens, turns = open_sequences(path / TOKENS), open_sequences(path / TURNS)
    try:
        lineage = np.load(path / LINEAGE, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path / LINEAGE} is damaged ({error}); build the store again") from None
    if not len(tokens.lengths) == len(turns.lengths) == len(lineage):
        raise StoreError(
            f"{path} is damaged: {len(tokens.lengths):,} samples, {len(turns.lengths):,} turn "
            f"records and {len(lineage):,} lineage rows should be equal; build it again"
        )
    records = turns if width == len(TURN_FIELDS) else UnitWeights(turns, width)
    return TokenStore(path, meta, tokens, records, (Lineage(lineage, 0),), range_in(meta))
