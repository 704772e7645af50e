"""What lint says: findings, what it could not check and why, and the verdict over both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from megasft.severity import Severity, Unchecked, counted, num_unchecked

MAX_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that fired.

    Attributes:
        rule: Its stable name.
        severity: An error fails a check in CI, a warning under ``--strict``, a note never.
        count: How often it fired.
        population: Out of how many; those looked at, where the rule looks at a part.
        unit: What is counted: "turns", "samples", "records", "tokens" or "stores".
        examples: The first places, as ``file:line``, at most ``MAX_EXAMPLES``.
        meaning: What is wrong, in a sentence.
        remedy: What to do, a flag or an edit.
        detail: What is special about this case; may be empty.
        sampled: It was looked for in a part of the samples only.
    """

    rule: str
    severity: Severity
    count: int
    population: int
    unit: str
    examples: tuple[str, ...]
    meaning: str
    remedy: str
    detail: str = ""
    sampled: bool = False

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
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"severity": self.severity.value, "share": self.share}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything lint found in one store, or in some files.

    Attributes:
        subject: The store or the files.
        findings: Errors first, then by share.
        unchecked: What did not run.
        num_rules: Rules that ran.
        counts: Samples, turns and tokens there are, and ``sampled``, those whose text was read.
    """

    subject: str
    findings: tuple[Finding, ...]
    unchecked: tuple[Unchecked, ...]
    num_rules: int
    counts: dict[str, int]

    def fails(self, *, strict: bool) -> bool:
        """Say whether a check in CI should fail."""
        failing = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
        return any(finding.severity in failing for finding in self.findings)

    def verdict(self) -> str:
        """Return one line with all numbers."""
        found = counted(finding.severity for finding in self.findings)
        not_run = num_unchecked(self.unchecked)
        rest = f", {not_run} not, or not on everything" if not_run else ""
        return (
            f"{self.subject}: {found} in {self.counts['samples']:,} samples, "
            f"{self.counts['turns']:,} turns, {self.counts['tokens']:,} tokens; "
            f"{self.num_rules} rules checked{rest}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` writes it."""
        return {
            "subject": self.subject,
            "verdict": self.verdict(),
            "counts": self.counts,
            "rules_checked": self.num_rules,
            "findings": [finding.as_json() for finding in self.findings],
            "unchecked": [{"rules": list(u.rules), "why": u.why} for u in self.unchecked],
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings with errors first, then the most frequent first."""
    return tuple(sorted(findings, key=lambda f: (f.severity.rank, -f.share, f.rule, f.detail)))
