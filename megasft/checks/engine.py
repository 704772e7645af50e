"""One engine of findings: rules that say what is wrong, and the report over all of them.

A rule is a function under ``@rule``, which gives it a name, a severity, a theme and what has to be
known to ask it. Its docstring is what it finds, in the words that ``--list`` prints: stated once,
beside the code. It yields findings of a fact and a remedy, and ``ask`` fills in the rest. Lint's
rules over samples return how often they fired instead, which lint makes one finding of. What
``megasft lint``, ``doctor`` and ``plan`` print, and the verification of a conversion, is a report
of such findings.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import ModuleType
from typing import Any


class Severity(StrEnum):
    """How much a finding matters; the order is that of the report.

    An error stops a run and fails a check in CI, a warning is printed once and fails under
    ``--strict``, a note never fails.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """Return its place in the order of the report."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        fact: What is so, with the numbers in it, in one sentence without its full stop; what the
            rule means where that says it all.
        remedy: What to do, a flag or an edit; empty where there is nothing to do.
        numbers: The numbers of the fact by name, for programs.
        rule: The stable name of what found it.
        severity: How bad it is.
        theme: What it is about; findings of one theme stand together.
        unit: What was counted, in the plural, where the rule counts; empty elsewhere.
        count: How often it fired.
        population: Out of how many; those looked at, where the rule looks at a part.
        examples: The first places, as ``file:line``.
        detail: What is special about this case; may be empty.
        sampled: It was looked for in a part of the samples only.
    """

    fact: str = ""
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    rule: str = ""
    severity: Severity = Severity.ERROR
    theme: str = ""
    unit: str = ""
    count: int = 0
    population: int = 0
    examples: tuple[str, ...] = ()
    detail: str = ""
    sampled: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether it is no error."""
        return self.severity is not Severity.ERROR

    @property
    def message(self) -> str:
        """Fact and remedy as one line, as errors are worded."""
        return f"{self.fact}; {self.remedy}" if self.remedy else self.fact

    @property
    def share(self) -> float:
        """Count over population, in ``[0, 1]``."""
        return self.count / self.population if self.population else 0.0

    @property
    def amount(self) -> str:
        """Count and unit: ``1 turn``, ``2,000 turns``."""
        return f"{self.count:,} {self.unit.removesuffix('s') if self.count == 1 else self.unit}"

    def as_json(self) -> dict[str, Any]:
        """Return the finding as ``--json`` writes it."""
        found = {"rule": self.rule, "severity": self.severity.value, "remedy": self.remedy}
        if not self.unit:
            return found | {"theme": self.theme, "fact": self.fact, "numbers": self.numbers}
        names = ("count", "population", "unit", "examples", "detail", "sampled", "share")
        return found | {"meaning": self.fact} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Rule[**P, R]:
    """One thing that can be wrong, or that is worth knowing.

    Attributes:
        name: Stable, for people and programs.
        severity: How bad it is.
        needs: What has to be known to ask; its words are those of who asks.
        meaning: What it finds, in a sentence without its full stop.
        theme: What it is about.
        check: Yields findings, or counts; None for a step of a run's start, which is an error
            where it refuses.
        remedy: What to do, where that is the same for all its findings.
        unit: What a rule that counts counts: "turns", "samples", "records", "tokens", "stores".
        announced: A run says it by itself as it starts, so it is the doctor's.
    """

    name: str
    severity: Severity
    needs: tuple[str, ...]
    meaning: str
    theme: str = ""
    check: Callable[P, R] | None = None
    remedy: str = ""
    unit: str = ""
    announced: bool = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function."""
        assert self.check is not None, f"{self.name} is a step"
        return self.check(*args, **kwargs)


def rule[**P, R](
    name: str,
    severity: Severity,
    *needs: str,
    theme: str = "",
    unit: str = "",
    announced: bool = False,
) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Make a function a rule.

    The first paragraph of its docstring is what it finds. One that begins with "Remedy: " is what
    to do, where that is the same for all findings.

    Example:
        >>> @rule("two", Severity.NOTE)
        ... def two(x: int) -> Iterable[Finding]:
        ...     '''The number is 2.'''
        ...     yield from [Finding("it is 2")] * (x == 2)
        >>> two.meaning, ask(two, 2)[0].rule
        ('the number is 2', 'two')
    """

    def make(check: Callable[P, R]) -> Rule[P, R]:
        meaning, remedy = _stated(inspect.getdoc(check) or "")
        return Rule(name, severity, needs, meaning, theme, check, remedy, unit, announced)

    return make


def step(
    name: str,
    needs: str,
    *,
    meaning: str,
    theme: str = "",
    severity: Severity = Severity.ERROR,
    remedy: str = "",
    unit: str = "",
) -> Rule[..., Any]:
    """Return a rule without a function: a step that takes place anyway, and that may refuse."""
    return Rule(name, severity, (needs,), meaning, theme, None, remedy, unit)


def _stated(docstring: str) -> tuple[str, str]:
    """Return what a docstring says a rule finds, and its remedy.

    What it finds is the first paragraph, without its full stop and without a capital but a name's.
    """
    meaning, *others = (" ".join(text.split()) for text in docstring.split("\n\n"))
    rest = meaning.partition(" ")[0][1:]
    if rest == rest.lower():
        meaning = meaning[:1].lower() + meaning[1:]
    remedies = [text.removeprefix("Remedy: ") for text in others if text.startswith("Remedy: ")]
    return meaning.removesuffix("."), "".join(remedies)


def rules_of(*modules: ModuleType) -> dict[str, Rule[..., Any]]:
    """Return the rules of some modules by name, in the order of the report: as they are defined."""
    found = [made for each in modules for made in vars(each).values() if isinstance(made, Rule)]
    return {made.name: made for made in found}


def ask[**P](rule: Rule[P, Iterable[Finding]], *args: P.args, **kwargs: P.kwargs) -> list[Finding]:
    """Ask a rule, and return what it finds, each with the rule's name, theme and severity."""
    return [named(rule, found) for found in rule(*args, **kwargs)]


def named(rule: Rule[..., Any], found: Finding, severity: Severity | None = None) -> Finding:
    """Return a finding with what its rule says of all of them, or with another severity."""
    return replace(
        found,
        rule=rule.name,
        theme=rule.theme,
        severity=severity or rule.severity,
        unit=rule.unit,
        fact=found.fact or rule.meaning,
        remedy=found.remedy or rule.remedy,
    )


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings with errors first; of those that count the most frequent, others as found."""
    return tuple(
        sorted(
            findings,
            key=lambda f: (f.severity.rank, -f.share, f.rule * bool(f.unit), f.detail),
        )
    )


@dataclass(frozen=True, slots=True)
class Unchecked:
    """Rules that did not run, or not on everything they should have seen, and why."""

    rules: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found.

    Attributes:
        findings: In order.
        unchecked: What did not run.
        num_rules: Rules that ran.
        facts: What is shown beside the findings, for programs.
        subject: What was looked at, where that is data.
        counts: Its samples, turns and tokens, and ``sampled``, those whose text was read.
    """

    findings: tuple[Finding, ...]
    unchecked: tuple[Unchecked, ...] = ()
    num_rules: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    subject: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    def fails(self, *, strict: bool = False) -> bool:
        """Say whether there are errors, or warnings where these count."""
        return bool(self.of(Severity.ERROR) or (strict and self.of(Severity.WARNING)))

    def verdict(self) -> str:
        """Return one line with all numbers."""
        num = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{num[s]} {s}{'' if num[s] == 1 else 's'}" for s in Severity)
        if self.counts:
            looked_at = [f"{self.counts[name]:,} {name}" for name in ("samples", "turns", "tokens")]
            found = f"{self.subject}: {found} in {', '.join(looked_at)}"
        missing = len({name for item in self.unchecked for name in item.rules})
        rest = f", {missing} not" if missing else ""
        rest += ", or not on everything" if missing and self.counts else ""
        return f"{found}; {self.num_rules} rules checked{rest}"

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` writes it."""
        about = {"subject": self.subject, "facts": self.facts, "counts": self.counts}
        return {name: value for name, value in about.items() if value} | {
            "verdict": self.verdict(),
            "rules_checked": self.num_rules,
            "findings": [finding.as_json() for finding in self.findings],
            "unchecked": [{"rules": list(u.rules), "why": u.why} for u in self.unchecked],
        }
