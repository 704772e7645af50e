"""What a verification found: a list of checks, each passed or not, with its figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megasft.checks.engine import Finding, Severity

_NO_FIGURES: Final[Mapping[str, Any]] = MappingProxyType({})


def passed(name: str, detail: str, figures: Mapping[str, Any] = _NO_FIGURES) -> Finding:
    """Return the answer to a question about a conversion that it passes.

    Args:
        name: As in the table.
        detail: What was found, for people.
        figures: The same in numbers, for the manifest.
    """
    return Finding(detail, rule=name, severity=Severity.NOTE, numbers=dict(figures))


def failed(name: str, detail: str, figures: Mapping[str, Any] = _NO_FIGURES) -> Finding:
    """Return the answer where it does not pass: the first places, and the reason."""
    return Finding(detail, rule=name, severity=Severity.ERROR, numbers=dict(figures))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Everything that was asked about a conversion.

    Attributes:
        hf: The Hugging Face folder that is the truth.
        checkpoint: Megatron's checkpoint.
        iteration: Name of the folder in it.
        hf_out: The folder converted back, if one was given.
        checks: In the order they were made.
    """

    hf: str
    checkpoint: str
    iteration: str
    hf_out: str | None
    checks: tuple[Finding, ...]

    @property
    def is_ok(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and all(check.is_ok for check in self.checks)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.is_ok)

    def check(self, name: str) -> Finding:
        """Return a check by its name.

        Raises:
            KeyError: It was not made.
        """
        for check in self.checks:
            if check.rule == name:
                return check
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict, for JSON."""
        checks = [
            {"name": one.rule, "is_ok": one.is_ok, "detail": one.fact, "figures": one.numbers}
            for one in self.checks
        ]
        return asdict(self) | {"checks": checks, "is_ok": self.is_ok}


def show(verification: Verification, *, console: Console | None = None) -> None:
    """Print a verification as a table, to standard output when no console is given."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in verification.checks:
        verdict = Text("ok", "green") if check.is_ok else Text("FAILED", "bold red")
        table.add_row(check.rule, verdict, Text(check.fact))
    console = console or Console(highlight=False)
    console.print(table)
    outcome = "verified" if verification.is_ok else "NOT the same model"
    back = f" and {verification.hf_out}" if verification.hf_out else ""
    console.print(
        f"{outcome}: {verification.hf}, {verification.checkpoint} ({verification.iteration}){back}",
        markup=False,
        soft_wrap=True,
    )
