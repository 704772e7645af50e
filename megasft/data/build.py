"""Conversation files to a token store: the pipeline behind ``megasft build``.

Workers parse, render and encode; one process, in input order, gives category names their ids and
writes, so the bytes of a store do not depend on the number of workers. A bad record is never
dropped in silence: it is reported, counted by reason and listed in ``<store>.rejected.jsonl``; the
store is then not made, unless the user asked to go on without it. Everything is read before that
verdict, because a list of all bad lines is worth more than the first one.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

import megasft
from megasft.data import unread_keys
from megasft.data.categories import Categories
from megasft.data.conversation import BadRecordError, Category, UnfaithfulError
from megasft.data.inputs import category_of, find_files
from megasft.data.read import Chunk, Source, open_sources, read_chunks
from megasft.data.remote import Location
from megasft.data.tokenize import Dropped, Elsewhere, Made, Outcome, Recipe, Rejected
from megasft.data.tokenizer_folder import TokenizerFacts
from megasft.data.unread_keys import Seen, UnreadKey
from megasft.data.workers import MakesSamples, Outcomes, ThisProcess, Workers
from megasft.errors import DataError, StoreError
from megasft.schema import TURN_FIELDS
from megasft.store import StoreWriter

logger = logging.getLogger(__name__)

_CATEGORY = TURN_FIELDS.index("category_id")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What ``megasft build`` was asked for.

    Attributes:
        inputs: Conversation files, folders, globs and URLs, in the order their samples are stored.
        output: Folder of the store.
        recipe: How a record becomes a sample.
        num_workers: Worker processes; 0 makes the samples in this one.
        ray: Address of a Ray cluster whose actors are the workers (0: as many as it has cores).
        skip_bad: Make the store without the bad records.
        overwrite: Replace a store that is there.
        category: Category of records that name none; empty for none.
        category_from_file: Give such records the name of their file instead.
    """

    inputs: tuple[str | Location, ...]
    output: Path
    recipe: Recipe
    num_workers: int = 0
    ray: str = ""
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
    stripped_turns: int = 0
    truncated: int = 0
    dropped: int = 0
    lost_tokens: int = 0
    lost_labels: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    stop_ids: set[int] = field(default_factory=set)
    unread: dict[UnreadKey, Seen] = field(default_factory=dict)
    texts: int = 0

    def add(self, made: Made, place: str) -> None:
        """Count a sample that is being written, made of the record at ``file:line``."""
        unread_keys.count(self.unread, made.unread, place)
        turns = made.sample.turns
        self.samples += 1
        self.texts += made.is_text
        self.turns += len(turns)
        self.tokens += len(made.sample.tokens)
        self.label_tokens += int(turns[:, TURN_FIELDS.index("num_tokens")].sum())
        self.turns_without_stop += len(turns) - len(made.stop_ids)
        self.border_tokens += made.num_border_tokens
        self.stop_ids.update(made.stop_ids)
        self.stripped_turns += made.stripped
        self.truncated += made.lost_tokens > 0
        self.lost_tokens += made.lost_tokens
        self.lost_labels += made.lost_labels

    def drop(self, dropped: Dropped) -> None:
        """Count a conversation that is left out because it is too long."""
        self.dropped += 1
        self.lost_tokens += dropped.num_tokens
        self.lost_labels += dropped.num_labels

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
            "stripped_turns": self.stripped_turns,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "lost_tokens": self.lost_tokens,
            "lost_label_tokens": self.lost_labels,
            "rejected": dict(sorted(self.rejected.items())),
        }


Progress = Callable[[int], None]
Complaint = Callable[[str, str], None]


def build(options: BuildOptions, *, on_bytes: Progress, on_rejected: Complaint) -> Tally:
    """Make a store, or leave none.

    Args:
        options: What was asked for.
        on_bytes: Called with the bytes of input that were just finished; negative when the build
            begins again.
        on_rejected: Called with ``file:line`` and a message for each bad record.

    Raises:
        DataError: An input cannot be read, a record is bad and may not be skipped, or no sample
            is left.
        StoreError: The store exists, or another build is writing it.
    """
    num_bytes = 0

    def count(num: int) -> None:
        nonlocal num_bytes
        num_bytes += num
        on_bytes(num)

    while True:
        try:
            return _build(options, count, on_rejected)
        except UnfaithfulError as error:
            logger.warning("%s", _WITHOUT[error.road].format(error.detail))
            options = replace(options, recipe=_slower(options.recipe, error.road))
            count(-num_bytes)


_WITHOUT: Final = {
    "render": "{}; the build begins again and compares every render with the chat template's",
    "encode": "{} from those of the tokenizer; the build begins again without gigatoken, some ten "
    "times slower (please report the tokenizer)",
}


def _slower(recipe: Recipe, road: str) -> Recipe:
    if road == "encode":
        return replace(recipe, encoder="tokenizers")
    return replace(recipe, rendering=replace(recipe.rendering, check_all=True))


def _build(options: BuildOptions, on_bytes: Progress, on_rejected: Complaint) -> Tally:
    sources = open_sources(find_files(options.inputs))
    tally, categories = Tally(), Categories()
    with _makers(options) as makers:
        facts = makers.facts()
        with StoreWriter(
            options.output, vocab_size=facts.vocab_size, overwrite=options.overwrite
        ) as writer:
            try:
                with options.rejected_path.open("wb") as rejected:
                    ledger = _Ledger(sources, tally, rejected, on_rejected)
                    for chunk, outcomes in makers.map(read_chunks(sources)):
                        named = [_categorized(o, options, sources[chunk.source]) for o in outcomes]
                        _store(chunk, named, writer, categories, ledger)
                        on_bytes(chunk.num_bytes)
                _judge(options, tally)
            except DataError:
                shutil.rmtree(writer.partial)  # a verdict, not an accident: nothing to restart
                raise
            finally:
                if not tally.rejected and not tally.dropped:
                    options.rejected_path.unlink(missing_ok=True)
            writer.finish(_meta(options.recipe, facts, tally, categories, sources))
    return tally


def _makers(options: BuildOptions) -> MakesSamples:
    if options.ray:
        from megasft.data.ray_workers import RayWorkers

        return RayWorkers(options.recipe, address=options.ray, num_workers=options.num_workers)
    if options.num_workers == 0:
        return ThisProcess(options.recipe)
    return Workers(options.recipe, num_workers=options.num_workers)


@dataclass(frozen=True, slots=True)
class _Ledger:
    sources: list[Source]
    tally: Tally
    file: BinaryIO
    on_rejected: Complaint

    def place(self, source_index: int, made: Made) -> str:
        return self.sources[source_index].place(made.line)

    def reject(self, source_index: int, bad: Rejected) -> None:
        self.tally.rejected[bad.reason] += 1
        place = self.sources[source_index].place(bad.line)
        self.on_rejected(place, f"{bad.reason}: {bad.detail}")
        self._write(source_index, bad.line, bad.reason, bad.detail)

    def drop(self, source_index: int, dropped: Dropped) -> None:
        self.tally.drop(dropped)
        detail = f"{dropped.num_tokens:,} tokens; left out (--too-long)"
        self._write(source_index, dropped.line, "dropped: too long", detail)

    def _write(self, source_index: int, line: int, reason: str, detail: str) -> None:
        entry = {"file": str(self.sources[source_index].path), "line": line}
        try:
            self.file.write(orjson.dumps(entry | {"reason": reason, "detail": detail}) + b"\n")
        except OSError as error:
            raise StoreError(f"{self.file.name} cannot be written: {error.strerror}") from None


def _categorized(outcome: Outcome, options: BuildOptions, source: Source) -> Outcome:
    if not isinstance(outcome, Made) or all(c != Category() for c in outcome.categories):
        return outcome
    name = category_of(source.path) if options.category_from_file else options.category
    default = Category(name=name or None)
    named = tuple(default if c == Category() else c for c in outcome.categories)
    return outcome._replace(categories=named)


def _store(
    chunk: Chunk, outcomes: Outcomes, writer: StoreWriter, categories: Categories, ledger: _Ledger
) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Elsewhere):
            continue
        ledger.tally.conversations += 1
        if isinstance(outcome, Rejected):
            ledger.reject(chunk.source, outcome)
            continue
        if isinstance(outcome, Dropped):
            ledger.drop(chunk.source, outcome)
            continue
        try:
            category_ids = [categories.resolve(category) for category in outcome.categories]
        except BadRecordError as error:
            ledger.reject(chunk.source, Rejected(outcome.line, error.reason, error.detail))
            continue
        outcome.sample.turns[:, _CATEGORY] = category_ids
        writer.add(outcome.sample, source=chunk.source, line=outcome.line)
        ledger.tally.add(outcome, ledger.place(chunk.source, outcome) if outcome.unread else "")


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
    recipe: Recipe,
    facts: TokenizerFacts,
    tally: Tally,
    categories: Categories,
    sources: list[Source],
) -> dict[str, Any]:
    return {
        "megasft_version": megasft.__version__,
        "recipe": {
            "fields": asdict(recipe.fields),
            "special_tokens_in_text": recipe.special_tokens_in_text,
            "stripped_thinking": recipe.rendering.stripped_thinking,
            "mask_thinking": recipe.rendering.mask_thinking,
            "mask_tool_calls": recipe.rendering.mask_tool_calls,
            "limit": asdict(recipe.limit),
            "part": asdict(recipe.part) if recipe.part else None,
        },
        "tokenizer": facts.meta,
        "special_tokens": facts.special_ids | {"end_of_turn": sorted(tally.stop_ids)},
        "categories": categories.as_meta(),
        "counts": tally.counts(),
        "texts": tally.texts,
        "unread_keys": unread_keys.as_meta(tally.unread),
        "sources": [source.as_meta() for source in sources],
    }
