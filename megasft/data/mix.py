"""Conversation files to one file: sampled by a mixture, shuffled, joined. Text in, text out.

The order is a matter of the seed alone. Only where each record lies is kept in memory (some 60
bytes a record), never its text: a plain .jsonl file is read again at the drawn places, and what
cannot be read at a place (compressed files, tables, JSON lists, remote files) is first copied to a
file beside the output, which is removed at the end. Rejected: to shuffle in a buffer, which mixes
badly when a file is sorted by category.

The output appears under its name when it is whole. A curriculum is refused here: the rows of a
store are shuffled again when they are trained, so it belongs to ``--megasft-mixture``.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megasft.data.categories import Categories
from megasft.data.conversation import MAX_RECORD_BYTES, BadRecordError
from megasft.data.formats import FieldMap, parse
from megasft.data.inputs import find_files
from megasft.data.join import join
from megasft.data.read import JSONL, Source, open_sources, read_chunks
from megasft.data.remote import size_of
from megasft.data.streams import GZIP_MAGIC, ZSTD_MAGIC
from megasft.draw import Draw, Population, draw
from megasft.errors import DataError
from megasft.mixture import Mixture
from megasft.schema import NO_CATEGORY

_BOM: Final = b"\xef\xbb\xbf"
_MAX_OPEN: Final = 128
_SHUFFLE, _JOIN = 0, 1
"""What a generator is for; each has a stream of its own."""


@dataclass(frozen=True, slots=True)
class MixOptions:
    """What ``megasft mix`` was asked for.

    Attributes:
        inputs: Conversation files, folders, globs, as the user wrote them.
        output: The .jsonl file to make.
        seed: Of the draw, the order and the joining.
        mixture: What to draw; every record once when None.
        join_probability: How likely a record joins the one before.
        fields: How records are read.
        skip_bad: Go on without the bad records.
        overwrite: Replace an output that is there.
    """

    inputs: tuple[str, ...]
    output: Path
    seed: int
    mixture: Mixture | None = None
    join_probability: float = 0.0
    fields: FieldMap = field(default_factory=FieldMap)
    skip_bad: bool = False
    overwrite: bool = False


class CategoryCount(NamedTuple):
    """Records of a category, read and drawn."""

    name: str
    found: int
    drawn: int


class Mixed(NamedTuple):
    """What was made.

    Attributes:
        categories: In the order of their ids; records without one last.
        num_read: Valid records read.
        turns_read: Assistant messages in them.
        num_drawn: Records drawn, copies counted.
        turns_drawn: Assistant messages in them.
        num_written: Conversations written; fewer than drawn where records were joined.
        rejected: Bad records by reason.
        warnings: What the mixture has to say.
    """

    categories: list[CategoryCount]
    num_read: int
    turns_read: int
    num_drawn: int
    turns_drawn: int
    num_written: int
    rejected: Counter[str]
    warnings: tuple[str, ...]


Progress = Callable[[int, int], None]
"""Called now and then with what is done, and of how much."""
Complaint = Callable[[str, str], None]


def mix(
    options: MixOptions, *, on_bytes: Progress, on_record: Progress, on_rejected: Complaint
) -> Mixed:
    """Make the output, or leave none.

    Args:
        options: What was asked for.
        on_bytes: Told the bytes of input that were read.
        on_record: Told the drawn records that were written.
        on_rejected: Called with ``file:line`` and a message for each bad record.

    Raises:
        DataError: An input cannot be read, a record is bad and may not be skipped, the mixture
            does not fit the data, or the output is there already or cannot be written.
    """
    named = [(file, item) for item in options.inputs for file in find_files([item])]
    sources = open_sources([file for file, _ in named])
    _require_free(options, sources)
    spool = options.output.with_name(options.output.name + ".spool")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with spool.open("wb") as file:
            places = _Places(sources, file, spool, on_rejected)
            places.read(options.fields, on_bytes)
        _judge(places, options)
        paths = [(str(source), item) for source, item in named]
        drawn = _drawn(places, options, paths)
        order = np.concatenate([stage.samples for stage in drawn.stages])
        np.random.default_rng([options.seed, _SHUFFLE]).shuffle(order)
        num_written = _write(options, places, order, on_record)
    except OSError as error:
        raise DataError(
            f"{options.output} cannot be written: {error.strerror or error}; free some space, or "
            "choose another --output"
        ) from None
    finally:
        spool.unlink(missing_ok=True)
    turns = np.asarray(places.turns)
    return Mixed(
        _by_category(places, order),
        num_read=len(turns),
        turns_read=int(turns.sum()),
        num_drawn=len(order),
        turns_drawn=int(turns[order].sum()),
        num_written=num_written,
        rejected=places.rejected,
        warnings=drawn.warnings,
    )


def _require_free(options: MixOptions, sources: Sequence[Source]) -> None:
    output = options.output
    if output.is_dir() or (output.exists() and not options.overwrite):
        raise DataError(f"{output} exists already; pass --overwrite to replace it")
    if any(isinstance(s.path, Path) and s.path.resolve() == output.resolve() for s in sources):
        raise DataError(f"{output} is one of the inputs; choose another --output")


class _Places:
    """Where each record lies and what it is, in columns; bad records are reported and left out."""

    def __init__(
        self, sources: Sequence[Source], spool: BinaryIO, spool_path: Path, complain: Complaint
    ) -> None:
        self._sources, self._spool, self._complain = sources, spool, complain
        self.categories = Categories()
        self.rejected: Counter[str] = Counter()
        self.source, self.category, self.turns = array("i"), array("i"), array("i")
        self.offset, self.size = array("q"), array("i")
        self.files = [
            source.path if _can_be_read_at_a_place(source) else spool_path for source in sources
        ]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, fields: FieldMap, on_bytes: Progress) -> None:
        """Read all sources once, checking each record."""
        # No record is bad because nothing of it is trained: that depends on how it is built.
        lenient = replace(fields, train_on="everything")
        total = sum(size_of(source.path) for source in self._sources)
        done = 0
        for number, source in enumerate(self._sources):
            records = self._copied(source) if self._is_copied(number) else _scanned(source)
            for line, offset, data, num_bytes in records:
                if data and not data.isspace():
                    self._add(number, (line, offset, data), lenient)
                done += num_bytes
                if num_bytes:
                    on_bytes(done, total)
        self._spool.flush()

    def _is_copied(self, number: int) -> bool:
        return self.files[number] != self._sources[number].path

    def _copied(self, source: Source) -> Iterator[tuple[int, int, bytes, int]]:
        for chunk in read_chunks([source]):
            size = chunk.num_bytes
            for line, data in chunk.records:
                text = data.strip()
                offset = self._spool.tell()
                if len(text) <= MAX_RECORD_BYTES:
                    self._spool.write(text + b"\n")
                yield line, offset, text, size
                size = 0

    def _add(self, number: int, record: tuple[int, int, bytes], fields: FieldMap) -> None:
        line, offset, data = record
        text = data.rstrip()
        try:
            conversation = parse(text, fields)
            own = next((m.category for m in conversation.messages if m.category), None)
            category = self.categories.resolve(own or conversation.category)
        except BadRecordError as error:
            self.rejected[error.reason] += 1
            self._complain(self._sources[number].place(line), f"{error.reason}: {error.detail}")
            return
        self.source.append(number)
        self.offset.append(offset)
        self.size.append(len(text))
        self.category.append(category)
        self.turns.append(sum(m.role == "assistant" for m in conversation.messages))


def _can_be_read_at_a_place(source: Source) -> bool:
    if source.kind != JSONL or not isinstance(source.path, Path):
        return False
    with source.path.open("rb") as file:
        magic = file.read(4)
    return not magic.startswith(GZIP_MAGIC) and magic != ZSTD_MAGIC


def _scanned(source: Source) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield line, offset, bytes and size of each line; of a line too long, only its beginning."""
    offset, line = 0, 1
    with Path(str(source.path)).open("rb") as file:
        while data := file.readline(MAX_RECORD_BYTES + 1):
            size, end = len(data), data
            while len(data) > MAX_RECORD_BYTES and end and not end.endswith(b"\n"):
                end = file.readline(MAX_RECORD_BYTES)
                size += len(end)
            skipped = len(_BOM) if line == 1 and data.startswith(_BOM) else 0
            yield line, offset + skipped, data[skipped:], size
            offset += size
            line += 1


def _judge(places: _Places, options: MixOptions) -> None:
    num_bad = places.rejected.total()
    reasons = "; ".join(f"{n:,} x {reason}" for reason, n in sorted(places.rejected.items()))
    verdict = f"{num_bad:,} of {num_bad + len(places):,} records are bad ({reasons})"
    if num_bad and not options.skip_bad:
        raise DataError(
            f"{verdict}; no file was made: mend them, or pass --skip-bad to go on without them"
        )
    if not len(places):
        raise DataError(f"{verdict}; no record is left, so no file was made")


def _drawn(places: _Places, options: MixOptions, paths: Sequence[tuple[str, ...]]) -> Draw:
    if options.mixture is None:
        return Draw.of_everything(len(places))
    if options.mixture.curriculum != "mixed":
        raise DataError(
            f"{options.mixture.path}: curriculum: {options.mixture.curriculum} has no effect on a "
            "file, whose records are shuffled again in training; drop it, and give the training "
            "--megasft-mixture instead"
        )
    names = {int(i): name for i, name in places.categories.as_meta().items()}
    population = Population(np.asarray(places.source), np.asarray(places.category), paths, names)
    return draw(options.mixture, population, seed=options.seed)


def _write(
    options: MixOptions, places: _Places, order: npt.NDArray[np.int64], on_record: Progress
) -> int:
    coins = np.random.default_rng([options.seed, _JOIN]).random(len(order))
    partial = options.output.with_name(options.output.name + ".partial")
    num_written = 0
    try:
        with partial.open("wb") as file, _Texts(places) as texts:
            records = _counted(map(texts.read, order.tolist()), len(order), on_record)
            if options.join_probability:
                is_wanted = (coins < options.join_probability).tolist()
                records = join(records, is_wanted, options.fields)
            for record in records:
                file.write(record + b"\n")
                num_written += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(options.output)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return num_written


def _counted(records: Iterator[bytes], total: int, on_record: Progress) -> Iterator[bytes]:
    for done, record in enumerate(records, start=1):
        yield record
        on_record(done, total)


class _Texts:
    """The bytes of records by number; keeps the files used last open."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, number: int) -> bytes:
        places = self._places
        path = str(places.files[places.source[number]])
        if path not in self._open:
            if len(self._open) == _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        data = os.pread(self._open[path], places.size[number], places.offset[number])
        if len(data) != places.size[number]:
            raise DataError(f"{path} became shorter while it was read; leave it alone meanwhile")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._open.values():
            os.close(handle)


def _by_category(places: _Places, order: npt.NDArray[np.int64]) -> list[CategoryCount]:
    names = places.categories.as_meta()
    found = np.asarray(places.category)
    ids = np.unique(found)
    rows = [
        CategoryCount(
            "(none)" if i == NO_CATEGORY else names[str(i)],
            int((found == i).sum()),
            int((found[order] == i).sum()),
        )
        for i in ids.tolist()
    ]
    return sorted(rows, key=lambda row: row.name == "(none)")
