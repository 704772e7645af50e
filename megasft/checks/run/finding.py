"""What preflight says: findings with fact, numbers and remedy, what is unchecked, the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megasft.severity import Severity, Unchecked, counted, num_unchecked


class Hit(NamedTuple):
    """What a rule returns each time it fires.

    Attributes:
        fact: What is so, with the numbers in it, in one sentence without its full stop.
        remedy: What to do, a flag or an edit; empty where there is nothing to do.
        numbers: The numbers of the fact by name, for programs.
    """

    fact: str
    remedy: str = ""
    numbers: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default; never written to

    @classmethod
    def from_message(cls, message: str) -> Hit:
        """Split a message of ``errors.py``, which ends in ``; remedy``.

        Example:
            >>> Hit.from_message("5 rows; add rows")
            Hit(fact='5 rows', remedy='add rows', numbers={})
        """
        fact, _, remedy = message.rpartition("; ")
        return cls(fact, remedy) if fact else cls(message)


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that fired.

    Attributes:
        rule: Its stable name.
        theme: What it is about; findings of one theme stand together.
        severity: An error stops the run, a warning is printed once, a note only by the doctor.
        fact: What is so, with the numbers in it.
        remedy: What to do; may be empty.
        numbers: The numbers of the fact by name.
    """

    rule: str
    theme: str
    severity: Severity
    fact: str
    remedy: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """Fact and remedy as one line, as errors are worded."""
        return f"{self.fact}; {self.remedy}" if self.remedy else self.fact

    def as_json(self) -> dict[str, Any]:
        """Return the finding as ``--json`` writes it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"severity": self.severity.value}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything preflight found.

    Attributes:
        findings: Errors first, then in the order of the table of rules.
        unchecked: What did not run.
        num_rules: Rules that ran.
        facts: The machine, the layout, the memory and the time of the run, for programs.
    """

    findings: tuple[Finding, ...]
    unchecked: tuple[Unchecked, ...]
    num_rules: int
    facts: dict[str, Any]

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    def verdict(self) -> str:
        """Return one line with all numbers."""
        found = counted(finding.severity for finding in self.findings)
        not_run = num_unchecked(self.unchecked)
        return f"{found}; {self.num_rules} rules checked" + (f", {not_run} not" if not_run else "")

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` writes it."""
        return {
            "verdict": self.verdict(),
            "facts": self.facts,
            "rules_checked": self.num_rules,
            "findings": [finding.as_json() for finding in self.findings],
            "unchecked": [{"rules": list(u.rules), "why": u.why} for u in self.unchecked],
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings with errors first, those of one severity as they came."""
    return tuple(sorted(findings, key=lambda f: f.severity.rank))


def text_of_count(number: float) -> str:
    """Return a number of parameters.

    Example:
        >>> text_of_count(8.19e9), text_of_count(1.31e6)
        ('8.19 B', '1.31 M')
    """
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def text_of_bytes(num_bytes: float) -> str:
    """Return a size as people compare it with the memory of a GPU: 1 GB is 1e9 bytes.

    Example:
        >>> text_of_bytes(80e9), text_of_bytes(2.5e6)
        ('80.0 GB', '2.5 MB')
    """
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
