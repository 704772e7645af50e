"""Conversation files to a token store: the pipeline behind ``megasft build``.

Workers parse, render and encode; one process, in input order, gives category names their ids and
writes, so the bytes of a store do not depend on the number of workers. A bad record is never
dropped in silence: it is reported, counted by reason and listed in ``<store>.rejected.jsonl``; the
store is then not made, unless the user asked to go on without it. Everything is read before that
verdict, because a list of all bad lines is worth more than the first one.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

import megasft
from megasft.data.categories import Categories
from megasft.data.conversation import BadRecordError, Category
from megasft.data.inputs import category_of, find_files
from megasft.data.read import Chunk, Source, open_sources, read_chunks
from megasft.data.tokenize import Made, Recipe, Rejected, Tokenizer
from megasft.data.workers import Outcomes, Workers
from megasft.errors import DataError
from megasft.schema import TURN_FIELDS
from megasft.store import StoreWriter

_CATEGORY = TURN_FIELDS.index("category_id")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What ``megasft build`` was asked for.

    Attributes:
        inputs: Conversation files, folders and globs, in the order their samples are stored.
        output: Folder of the store.
        recipe: How a record becomes a sample.
        num_workers: Processes; 1 works in this one.
        skip_bad: Make the store without the bad records.
        overwrite: Replace a store that is there.
        category: Category of records that name none; empty for none.
        category_from_file: Give such records the name of their file instead.
    """

    inputs: tuple[Path, ...]
    output: Path
    recipe: Recipe
    num_workers: int = 1
    skip_bad: bool = False
    overwrite: bool = False
    category: str = ""
    category_from_file: bool = False

    @property
    def rejected_path(self) -> Path:
        """Where the bad records are listed."""
        return self.output.with_name(self.output.name + ".rejected.jsonl")


@dataclass(slots=True)
class Tally:
    """What has been counted so far; ``counts`` is what store.json keeps of it."""

    conversations: int = 0
    samples: int = 0
    turns: int = 0
    tokens: int = 0
    label_tokens: int = 0
    turns_without_stop: int = 0
    border_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    stop_ids: set[int] = field(default_factory=set)

    def add(self, made: Made) -> None:
        """Count a sample that is being written."""
        turns = made.sample.turns
        self.samples += 1
        self.turns += len(turns)
        self.tokens += len(made.sample.tokens)
        self.label_tokens += int(turns[:, TURN_FIELDS.index("num_tokens")].sum())
        self.turns_without_stop += len(turns) - len(made.stop_ids)
        self.border_tokens += made.num_border_tokens
        self.stop_ids.update(made.stop_ids)

    def counts(self) -> dict[str, Any]:
        """Return the counts for store.json, rejected ones by reason."""
        return {
            "conversations": self.conversations,
            "samples": self.samples,
            "turns": self.turns,
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "turns_without_stop": self.turns_without_stop,
            "border_tokens": self.border_tokens,
            "rejected": dict(sorted(self.rejected.items())),
        }


Progress = Callable[[int], None]
Complaint = Callable[[str, str], None]


def build(options: BuildOptions, *, on_bytes: Progress, on_rejected: Complaint) -> Tally:
    """Make a store, or leave none.

    Args:
        options: What was asked for.
        on_bytes: Called with the bytes of input that were just finished.
        on_rejected: Called with ``file:line`` and a message for each bad record.

    Raises:
        DataError: An input cannot be read, a record is bad and may not be skipped, or no sample
            is left.
        StoreError: The store exists, or another build is writing it.
    """
    sources = open_sources(find_files(options.inputs))
    tokenizer = Tokenizer(options.recipe)
    tally, categories = Tally(), Categories()
    with StoreWriter(
        options.output, vocab_size=len(tokenizer.hf), overwrite=options.overwrite
    ) as writer:
        try:
            with options.rejected_path.open("wb") as rejected:
                ledger = _Ledger(sources, tally, rejected, on_rejected)
                for chunk, outcomes in _outcomes(options, tokenizer, read_chunks(sources)):
                    named = [_categorized(o, options, sources[chunk.source]) for o in outcomes]
                    _store(chunk, named, writer, categories, ledger)
                    on_bytes(chunk.num_bytes)
            _judge(options, tally)
        except DataError:
            shutil.rmtree(writer.partial)  # a verdict, not an accident: nothing to restart
            raise
        finally:
            if not tally.rejected:
                options.rejected_path.unlink(missing_ok=True)
        writer.finish(_meta(tokenizer, tally, categories, sources))
    return tally


def _outcomes(
    options: BuildOptions, tokenizer: Tokenizer, chunks: Iterable[Chunk]
) -> Iterator[tuple[Chunk, Outcomes]]:
    if options.num_workers == 1:
        for chunk in chunks:
            yield chunk, tokenizer.make(chunk.records)
        return
    with Workers(options.recipe, num_workers=options.num_workers) as workers:
        yield from workers.map(chunks)


@dataclass(frozen=True, slots=True)
class _Ledger:
    sources: list[Source]
    tally: Tally
    file: BinaryIO
    on_rejected: Complaint

    def reject(self, source_index: int, bad: Rejected) -> None:
        source = self.sources[source_index]
        self.tally.rejected[bad.reason] += 1
        self.on_rejected(source.place(bad.line), f"{bad.reason}: {bad.detail}")
        entry = {"file": str(source.path), "line": bad.line}
        entry |= {"reason": bad.reason, "detail": bad.detail}
        self.file.write(orjson.dumps(entry) + b"\n")


def _categorized(
    outcome: Made | Rejected, options: BuildOptions, source: Source
) -> Made | Rejected:
    if isinstance(outcome, Rejected) or outcome.category != Category():
        return outcome
    name = category_of(source.path) if options.category_from_file else options.category
    return outcome._replace(category=Category(name=name or None))


def _store(
    chunk: Chunk, outcomes: Outcomes, writer: StoreWriter, categories: Categories, ledger: _Ledger
) -> None:
    for outcome in outcomes:
        ledger.tally.conversations += 1
        if isinstance(outcome, Rejected):
            ledger.reject(chunk.source, outcome)
            continue
        try:
            category_id = categories.resolve(outcome.category)
        except BadRecordError as error:
            ledger.reject(chunk.source, Rejected(outcome.line, error.reason, error.detail))
            continue
        outcome.sample.turns[:, _CATEGORY] = category_id
        writer.add(outcome.sample, source=chunk.source, line=outcome.line)
        ledger.tally.add(outcome)


def _judge(options: BuildOptions, tally: Tally) -> None:
    num_bad = tally.rejected.total()
    reasons = "; ".join(f"{n:,} x {reason}" for reason, n in sorted(tally.rejected.items()))
    verdict = (
        f"{num_bad:,} of {tally.conversations:,} records are bad ({reasons}), all listed in "
        f"{options.rejected_path}"
    )
    if num_bad and not options.skip_bad:
        raise DataError(
            f"{verdict}; no store was made: mend them, or pass --skip-bad to go on without them"
        )
    if not tally.samples:
        raise DataError(f"{verdict}; no sample is left, so no store was made")


def _meta(
    tokenizer: Tokenizer, tally: Tally, categories: Categories, sources: list[Source]
) -> dict[str, Any]:
    hf = tokenizer.hf
    return {
        "megasft_version": megasft.__version__,
        "tokenizer": tokenizer.facts(),
        "special_tokens": {
            "bos": hf.bos_token_id,
            "eos": hf.eos_token_id,
            "pad": hf.pad_token_id,
            "end_of_turn": sorted(tally.stop_ids),
        },
        "categories": categories.as_meta(),
        "counts": tally.counts(),
        "sources": [source.as_meta() for source in sources],
    }
