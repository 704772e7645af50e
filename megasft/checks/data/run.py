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

from megasft.checks.data import id_rules, record_rules, store_rules, text_rules
from megasft.checks.data.sources import SourceChangedError, conversations_of, keys_of_messages
from megasft.checks.data.subject import (
    MAX_EXAMPLES,
    Needs,
    Subject,
    blocks,
    keys_of_tokens,
    vocabulary_of,
)
from megasft.checks.data.text_rules import text_reader
from megasft.checks.data.witness import Transformers, UncheckableError, witness
from megasft.checks.engine import (
    Finding,
    Report,
    Rule,
    Unchecked,
    ask,
    in_order,
    named,
    rules_of,
)
from megasft.data.build import BuildOptions, build
from megasft.data.chat_template import ChatTemplate
from megasft.data.conversation import BadRecordError
from megasft.data.formats import FieldMap
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer_folder import TokenizerFolder, open_folder
from megasft.data.tool_calls import ArgumentForm
from megasft.errors import DataError
from megasft.schema import TURN_FIELDS
from megasft.store import TokenStore, open_store

_DEFINED: Final = rules_of(store_rules, record_rules, id_rules, text_rules)
RULES: Final = dict(sorted(_DEFINED.items(), key=lambda item: item[1].severity.rank))
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
class _Hits:
    """Hits of one rule, or of one reason of it: their number, the first places and detail."""

    count: int = 0
    places: list[Any] = field(default_factory=list)
    detail: str = ""

    def add(self, count: int, places: Iterable[Any], detail: str = "") -> None:
        self.count += count
        self.detail = self.detail or detail
        for place in places:
            if len(self.places) == MAX_EXAMPLES:
                return
            if place not in self.places:
                self.places.append(place)


@dataclass(slots=True)
class _Run:
    """One pass over one store.

    Attributes:
        counts: Samples, turns and tokens of the store.
    """

    subject: Subject
    options: LintOptions
    why_no_tokenizer: str
    counts: dict[str, int]
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)
    num_rules: int = 0

    @property
    def has_tokenizer(self) -> bool:
        return self.subject.vocabulary.hf is not None

    def rules(self, kind: Needs) -> list[Rule[..., Any]]:
        """Return the rules of one kind that are to run."""
        rules = [rule for rule in RULES.values() if kind in rule.needs]
        rules = [rule for rule in rules if rule.name not in self.options.ignored]
        needing = [rule for rule in rules if Needs.TOKENIZER in rule.needs]
        if not self.has_tokenizer:
            self.skip(needing, self.why_no_tokenizer)
            rules = [rule for rule in rules if rule not in needing]
        return rules

    def skip(self, rules: Iterable[Rule[..., Any] | str], why: str) -> None:
        names = tuple(rule if isinstance(rule, str) else rule.name for rule in rules)
        if names:
            self.unchecked.append(Unchecked(names, why))

    def count(self, hits: dict[Rule[..., Any], _Hits], looked_at: list[int] | None = None) -> None:
        """Make findings of what was counted, in all samples or in some."""
        self.num_rules += len(hits)
        turns = self.subject.store.turns.lengths // len(TURN_FIELDS)
        for rule, found in hits.items():
            population = self.counts[rule.unit]
            if looked_at is not None:
                population = len(looked_at)
                if rule.unit == "turns":
                    population = int(turns[looked_at].sum())
            finding = Finding(
                count=found.count,
                population=population,
                examples=self.subject.places(found.places),
                sampled=population < self.counts[rule.unit],
            )
            self.findings.append(named(rule, finding))


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
    rejections: dict[str, _Hits] = {}

    def on_rejected(place: str, message: str) -> None:
        reason, _, detail = message.partition(": ")
        rejections.setdefault(reason, _Hits()).add(1, [place], detail)

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
    found = [_rejected(reason, hits, total) for reason, hits in rejections.items()]
    return replace(
        report, findings=in_order([*report.findings, *found]), num_rules=report.num_rules + 1
    )


def _lint_built(store: TokenStore, options: LintOptions, name: str) -> Report:
    folder, why = _tokenizer_of(store, options.tokenizer)
    assert folder is not None, "the store was built with it a moment ago"
    keys = keys_of_messages(store, options.fields)
    subject = Subject(store, vocabulary_of(store, folder.hf), keys)
    report = _lint(subject, _as_built(store, options), name, why)
    # record-rejected and thinking-lost say it with places.
    findings = tuple(f for f in report.findings if f.rule != "left-out")
    return replace(report, findings=findings)


def _nothing_left(name: str) -> Report:
    checked = Unchecked(tuple(n for n in RULES if n != "record-rejected"), "no sample is left")
    counts = dict.fromkeys(("samples", "turns", "tokens"), 0)
    return Report((), (checked,), subject=name, counts=counts)


def _rejected(reason: str, hits: _Hits, total: int) -> Finding:
    finding = Finding(
        f"{store_rules.RECORD_REJECTED.meaning}: {reason}",
        count=hits.count,
        population=total,
        examples=tuple(hits.places),
        detail=f"{hits.places[0]}: {hits.detail}",
    )
    return named(store_rules.RECORD_REJECTED, finding)


def _lint(subject: Subject, options: LintOptions, name: str, why_no_tokenizer: str) -> Report:
    run = _Run(subject, options, why_no_tokenizer, subject.counts)
    _check_ids(run)
    for rule in run.rules(Needs.STORE):
        run.num_rules += 1
        run.findings += ask(rule, subject)
    indices = _sampled(len(subject.store), options.num_sampled)
    if run.has_tokenizer:
        _check_texts(run, indices)
        _check_records(run, indices)
    else:
        run.skip([*run.rules(Needs.TEXT), *run.rules(Needs.RECORD)], why_no_tokenizer)
    run.skip(sorted(options.ignored - options.expected), "--ignore")
    run.skip(
        sorted(options.expected),
        "the store was built with --train-on everything, --mask-*, or of pretraining texts",
    )
    findings = in_order(finding for finding in run.findings if finding.count)
    counts = run.counts | {"sampled": len(indices) if run.has_tokenizer else 0}
    return Report(findings, tuple(run.unchecked), run.num_rules, subject=name, counts=counts)


def _check_ids(run: _Run) -> None:
    hits = {rule: _Hits() for rule in run.rules(Needs.IDS)}
    for block in blocks(run.subject.store):
        for rule, found in hits.items():
            samples = rule(block, run.subject.vocabulary)
            found.add(len(samples), (samples + block.first).tolist())
    run.count(hits)


def _check_texts(run: _Run, indices: list[int]) -> None:
    read = text_reader(run.subject.store, run.subject.vocabulary)
    hits = {rule: _Hits() for rule in run.rules(Needs.TEXT)}
    for index in indices if hits else ():
        texts = read(index)
        for rule, found in hits.items():
            num = rule(texts)
            found.add(num, [index] if num else [])
    run.count(hits, indices)


def _check_records(run: _Run, indices: list[int]) -> None:
    store, rules = run.subject.store, run.rules(Needs.RECORD)
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
    witnessed, num_spelled, hits = [], 0, {rule: _Hits() for rule in rules}
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
        for rule, found in hits.items():
            num = rule(seen)
            found.add(num, [index] if num else [])
    run.count(hits, witnessed)
    _skip_records(run, rules, refused, num_spelled)


def _skip_records(
    run: _Run, rules: list[Rule[..., Any]], refused: Counter[str], num_spelled: int
) -> None:
    for why, num in refused.most_common(3):
        run.skip(rules, f"on {num:,} of the conversations looked at: {why}")
    if num_spelled:
        run.skip(
            (rule for rule in rules if Needs.SAME_TOKENS in rule.needs),
            f"on {num_spelled:,} of the conversations looked at: they spell a special token, which "
            "transformers would make a control token",
        )


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
