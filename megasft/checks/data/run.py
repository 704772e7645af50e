"""Runs the rules over a store, or over files by way of a store that is thrown away.

Rules over ids see every sample. Rules over text and conversations see ``num_sampled`` of them,
drawn with a fixed seed, because decoding and rendering cost a millisecond a sample. What cannot be
checked (no tokenizer, another one than the store's, sources gone) is said, never passed over.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from megasft.checks.data.blocks import blocks
from megasft.checks.data.finding import MAX_EXAMPLES, Finding, Report, in_order
from megasft.checks.data.rules import RULES, OnIds, OnRecord, OnStore, OnText, Rule
from megasft.checks.data.sources import SourceChangedError, conversations_of, keys_of_messages
from megasft.checks.data.store_rules import Hits, Keys, Subject, keys_of_tokens
from megasft.checks.data.text_rules import text_reader
from megasft.checks.data.vocabulary import vocabulary_of
from megasft.checks.data.witness import Transformers, UncheckableError, witness
from megasft.data.build import BuildOptions, build
from megasft.data.chat_template import ChatTemplate
from megasft.data.conversation import BadRecordError
from megasft.data.formats import FieldMap
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer_folder import TokenizerFolder, open_folder
from megasft.data.tool_calls import ArgumentForm
from megasft.errors import DataError
from megasft.schema import TURN_FIELDS
from megasft.severity import Unchecked
from megasft.store import TokenStore, open_store

DEFAULT_SAMPLED: Final = 2_000
_BROKEN_BY_EVERYTHING: Final = {"mask-all-one"}
_BROKEN_BY_MASKS: Final = {
    "mask_thinking": {"answer-start-untrained"},
    "mask_tool_calls": {
        *("tool-calls", "tool-arguments-untrained", "turn-without-stop", "stop-not-trained")
    },
}
"""Rules that stores built with these options break on purpose."""


@dataclass(frozen=True, slots=True)
class LintOptions:
    """What lint was asked for.

    Attributes:
        tokenizer: Its folder; None for the one store.json names.
        num_sampled: Samples whose text is read; 0 for all.
        fields: How records become conversations.
        ignored: Rules that do not run.
        chat_template: Jinja source that replaces the tokenizer's, for files; a store knows its own.
        expected: Ignored rules that the store was made to break.
    """

    tokenizer: Path | None = None
    num_sampled: int = DEFAULT_SAMPLED
    fields: FieldMap = field(default_factory=FieldMap)
    ignored: frozenset[str] = frozenset()
    chat_template: str = ""
    expected: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Tally:
    """Hits of one rule: their number, and the first samples."""

    count: int = 0
    samples: list[int] = field(default_factory=list)
    detail: str = ""
    population: int | None = None

    def add(self, count: int, samples: Iterable[int]) -> None:
        self.count += count
        for sample in samples:
            if len(self.samples) == MAX_EXAMPLES:
                return
            if sample not in self.samples:
                self.samples.append(sample)


@dataclass(slots=True)
class _Rejections:
    """Records rejected for one reason: their number, the first places, the first detail."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    detail: str = ""

    def add(self, place: str, detail: str) -> None:
        self.count += 1
        self.detail = self.detail or detail
        if len(self.places) < MAX_EXAMPLES:
            self.places.append(place)


@dataclass(slots=True)
class _Run:
    """One pass over one store."""

    subject: Subject
    options: LintOptions
    tallies: dict[str, _Tally] = field(default_factory=dict)
    unchecked: list[Unchecked] = field(default_factory=list)

    def rules(self, kind: type[Any]) -> dict[str, Rule]:
        """Return the rules of one kind that are to run."""
        return {
            name: rule
            for name, rule in RULES.items()
            if isinstance(rule.on, kind) and name not in self.options.ignored
        }

    def skip(self, names: Iterable[str], why: str) -> None:
        if listed := tuple(names):
            self.unchecked.append(Unchecked(listed, why))

    def tally(self, name: str) -> _Tally:
        return self.tallies.setdefault(name, _Tally())


def lint_store(store: TokenStore, options: LintOptions) -> Report:
    """Check a store.

    Raises:
        DataError: The tokenizer that was asked for is not the store's.
    """
    folder, why = _tokenizer_of(store, options.tokenizer)
    options = _as_built(store, options)
    vocabulary = vocabulary_of(store, folder.hf if folder else None)
    subject = Subject(store, vocabulary, keys_of_tokens(store))
    return _lint(subject, options, str(store.path), why)


def _as_built(store: TokenStore, options: LintOptions) -> LintOptions:
    """Return the options with what store.json says of how its records were read."""
    recipe, fields = store.meta.get("recipe"), options.fields
    if recipe is not None and fields == FieldMap():
        fields = FieldMap(**recipe["fields"])
    is_whole = fields.train_on == "everything" or store.meta.get("texts", 0) > 0
    broken = set(_BROKEN_BY_EVERYTHING) if is_whole else set()
    for option, rules in _BROKEN_BY_MASKS.items():
        broken |= rules if (recipe or {}).get(option) else set()
    expected = frozenset(broken - options.ignored)
    return replace(options, fields=fields, ignored=options.ignored | expected, expected=expected)


def lint_files(files: tuple[Path, ...], options: LintOptions) -> Report:
    """Check conversation files: build a store of them in a temporary folder, and check that.

    Raises:
        DataError: A file cannot be read, or there is no tokenizer.
    """
    assert options.tokenizer is not None, "files need a tokenizer"
    rejections: dict[str, _Rejections] = {}

    def on_rejected(place: str, message: str) -> None:
        reason, _, detail = message.partition(": ")
        rejections.setdefault(reason, _Rejections()).add(place, detail)

    def on_bytes(num_bytes: int) -> None:
        if num_bytes < 0:  # the build begins again
            rejections.clear()

    name = ", ".join(str(file) for file in files)
    with tempfile.TemporaryDirectory(prefix="megasft-lint-") as folder:
        recipe = Recipe(options.tokenizer, options.fields, chat_template=options.chat_template)
        build_options = BuildOptions(files, Path(folder) / "store", recipe, skip_bad=True)
        try:
            build(build_options, on_bytes=on_bytes, on_rejected=on_rejected)
        except DataError as error:
            if "no sample is left" not in str(error):
                raise
            report = _nothing_left(name)
        else:
            report = _lint_built(open_store(build_options.output), options, name)
    if "record-rejected" in options.ignored:
        return report
    total = report.counts["samples"] + sum(r.count for r in rejections.values())
    found = [_rejected(reason, places, total) for reason, places in rejections.items()]
    return replace(
        report, findings=in_order([*report.findings, *found]), num_rules=report.num_rules + 1
    )


def _lint_built(store: TokenStore, options: LintOptions, name: str) -> Report:
    folder, why = _tokenizer_of(store, options.tokenizer)
    assert folder is not None, "the store was built with it a moment ago"
    keys: Keys = keys_of_messages(store, options.fields)
    subject = Subject(store, vocabulary_of(store, folder.hf), keys)
    report = _lint(subject, _as_built(store, options), name, why)
    # record-rejected and thinking-lost say it with places.
    findings = tuple(f for f in report.findings if f.rule != "left-out")
    return replace(report, findings=findings)


def _nothing_left(name: str) -> Report:
    checked = Unchecked(tuple(n for n in RULES if n != "record-rejected"), "no sample is left")
    return Report(name, (), (checked,), 0, dict.fromkeys(("samples", "turns", "tokens"), 0))


def _rejected(reason: str, rejections: _Rejections, total: int) -> Finding:
    rule = RULES["record-rejected"]
    return Finding(
        "record-rejected", rule.severity, rejections.count, total, rule.unit,
        tuple(rejections.places), f"{rule.meaning}: {reason}", rule.remedy,
        f"{rejections.places[0]}: {rejections.detail}",
    )  # fmt: skip


def _lint(subject: Subject, options: LintOptions, name: str, why_no_tokenizer: str) -> Report:
    run = _Run(subject, options)
    _check_ids(run, why_no_tokenizer)
    _check_store(run, why_no_tokenizer)
    indices = _sampled(len(subject.store), options.num_sampled)
    if subject.vocabulary.hf is None:
        run.skip([*run.rules(OnText), *run.rules(OnRecord)], why_no_tokenizer)
    else:
        _check_texts(run, indices)
        _check_records(run, indices)
    run.skip(sorted(options.ignored - options.expected), "--ignore")
    run.skip(
        sorted(options.expected),
        "the store was built with --train-on everything, --mask-*, or of pretraining texts",
    )
    counts = {
        "samples": len(subject.store),
        "turns": int(subject.store.turns.offsets[-1]) // len(TURN_FIELDS),
        "tokens": int(subject.store.tokens.lengths.sum(dtype=np.int64)),
        "sampled": len(indices) if subject.vocabulary.hf is not None else 0,
    }
    found = [_finding(run, rule, tally, counts) for rule, tally in run.tallies.items()]
    findings = in_order(f for f in found if f.count)
    return Report(name, findings, tuple(run.unchecked), len(run.tallies), counts)


def _check_ids(run: _Run, why_no_tokenizer: str) -> None:
    rules = _runnable(run, OnIds, why_no_tokenizer)
    for block in blocks(run.subject.store):
        for name, rule in rules.items():
            assert isinstance(rule.on, OnIds)
            hits = rule.on.check(block, run.subject.vocabulary)
            run.tally(name).add(len(hits), (hits + block.first).tolist())


def _check_store(run: _Run, why_no_tokenizer: str) -> None:
    for name, rule in _runnable(run, OnStore, why_no_tokenizer).items():
        assert isinstance(rule.on, OnStore)
        hits: Hits = rule.on.check(run.subject)
        tally = run.tally(name)
        tally.add(hits.num, hits.samples)
        tally.detail, tally.population = hits.detail, hits.population


def _check_texts(run: _Run, indices: list[int]) -> None:
    read = text_reader(run.subject.store, run.subject.vocabulary)
    rules = run.rules(OnText)
    for index in indices if rules else ():
        texts = read(index)
        for name, rule in rules.items():
            assert isinstance(rule.on, OnText)
            hits = rule.on.check(texts)
            run.tally(name).add(hits, [index] if hits else [])
    _set_populations(run, rules, indices)


def _check_records(run: _Run, indices: list[int]) -> None:
    store, rules = run.subject.store, run.rules(OnRecord)
    facts = store.meta.get("tokenizer", {})
    template, date = facts.get("chat_template", ""), facts.get("template_date")
    transformers = Transformers(run.subject.vocabulary.hf, template, _date(date))
    if _is_another(template or transformers.hf.get_chat_template(), facts):
        run.skip(rules, "the tokenizer's chat template is not the one the store was made with")
        return
    try:
        conversations = conversations_of(store, indices, run.options.fields)
    except SourceChangedError as error:
        run.skip(rules, str(error))
        return
    refused: Counter[str] = Counter()
    source = template or transformers.hf.get_chat_template(tools=[{}])
    forms = ArgumentForm(ChatTemplate(source, transformers.hf.special_tokens_map))
    witnessed, num_spelled = [], 0
    for index, conversation in sorted(conversations.items()):
        if not isinstance(conversation, BadRecordError) and conversation.is_text:
            continue  # no chat template has seen it
        if isinstance(conversation, BadRecordError):
            refused[f"{conversation.reason}: {conversation.detail}"] += 1
            continue
        try:
            seen = witness(transformers, forms.fit(conversation), store.sample(index))
        except (UncheckableError, BadRecordError) as error:
            refused[str(error)] += 1
            continue
        witnessed.append(index)
        num_spelled += seen.spells_special and not seen.same_tokens
        for name, rule in rules.items():
            assert isinstance(rule.on, OnRecord)
            hits = rule.on.check(seen)
            run.tally(name).add(hits, [index] if hits else [])
    _set_populations(run, rules, witnessed)
    _skip_records(run, rules, refused, num_spelled)


def _skip_records(
    run: _Run, rules: dict[str, Rule], refused: Counter[str], num_spelled: int
) -> None:
    for why, num in refused.most_common(3):
        run.skip(rules, f"on {num:,} of the conversations looked at: {why}")
    if num_spelled:
        run.skip(
            (name for name, rule in rules.items() if getattr(rule.on, "needs_same_tokens", False)),
            f"on {num_spelled:,} of the conversations looked at: they spell a special token, which "
            "transformers would make a control token",
        )


def _set_populations(run: _Run, rules: dict[str, Rule], indices: list[int]) -> None:
    num_turns = sum(len(run.subject.store.sample(i).turns) for i in indices)
    for name, rule in rules.items():
        run.tally(name).population = num_turns if rule.unit == "turns" else len(indices)


def _runnable(run: _Run, kind: type[OnIds | OnStore], why: str) -> dict[str, Rule]:
    rules = run.rules(kind)
    if run.subject.vocabulary.hf is None:
        needing = [n for n, r in rules.items() if getattr(r.on, "needs_tokenizer", False)]
        run.skip(needing, why)
        rules = {name: rule for name, rule in rules.items() if name not in needing}
    return rules


def _finding(run: _Run, name: str, tally: _Tally, counts: dict[str, int]) -> Finding:
    rule = RULES[name]
    population = counts.get(rule.unit, 0) if tally.population is None else tally.population
    sampled = isinstance(rule.on, OnText | OnRecord) and population < counts.get(rule.unit, 0)
    return Finding(
        name, rule.severity, tally.count, population, rule.unit,
        tuple(run.subject.store.source_line(i) for i in tally.samples),
        rule.meaning, rule.remedy, tally.detail, sampled,
    )  # fmt: skip


def _sampled(num_samples: int, wanted: int) -> list[int]:
    if wanted == 0 or wanted >= num_samples:
        return list(range(num_samples))
    drawn = np.random.default_rng([0, num_samples]).choice(num_samples, wanted, replace=False)
    return sorted(int(i) for i in drawn)


def _tokenizer_of(store: TokenStore, asked: Path | None) -> tuple[TokenizerFolder | None, str]:
    """Return the store's tokenizer, or None and why there is none."""
    facts = store.meta.get("tokenizer", {})
    path = asked or Path(facts.get("path", ""))
    if not facts.get("path") and asked is None:
        return None, "store.json names no tokenizer; give it with --tokenizer DIR"
    if not path.is_dir() and asked is None:
        return None, f"the tokenizer is not at {path} any more; give it with --tokenizer DIR"
    folder = open_folder(path, chat_template=facts.get("chat_template", ""))
    expected, found = facts.get("sha256"), folder.facts().meta["sha256"]
    if expected in (None, found):
        return folder, ""
    difference = (
        f"{path} is not the tokenizer the store was made with (sha256 {found[:12]}, not "
        f"{str(expected)[:12]})"
    )
    if asked is not None:
        raise DataError(f"{difference}; give the right folder with --tokenizer DIR")
    return None, f"{difference}; give the old one with --tokenizer DIR, or build again"


def _date(text: str | None) -> datetime | None:
    return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) if text else None


def _is_another(template: str, facts: dict[str, Any]) -> bool:
    found = hashlib.sha256(template.encode()).hexdigest()
    return bool(facts.get("chat_template_sha256", found) != found)
