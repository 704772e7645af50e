"""How much a finding matters, what was not checked, and how many of each there are.

``megasft lint`` looks at data, the preflight at a run; both find by named rules, and their readers
learn one order and one set of words.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters; the order is that of the report."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """Return its place in the order of the report."""
        return list(Severity).index(self)


@dataclass(frozen=True, slots=True)
class Unchecked:
    """Rules that did not run, or not on everything they should have seen, and why."""

    rules: tuple[str, ...]
    why: str


def counted(severities: Iterable[Severity]) -> str:
    """Say how many findings there are of each severity.

    Example:
        >>> counted([Severity.NOTE, Severity.ERROR])
        '1 error, 0 warnings, 1 note'
    """
    num = Counter(severities)
    return ", ".join(f"{num[s]} {s}{'' if num[s] == 1 else 's'}" for s in Severity)


def num_unchecked(unchecked: Sequence[Unchecked]) -> int:
    """Count the rules that did not run, each once."""
    return len({rule for item in unchecked for rule in item.rules})
