"""Asks the rules of a run, stage by stage, and takes the steps between them.

A run asks the same rules as ``megasft doctor``, on every rank, because each rank has its own
machine; rank 0 prints. A rule that fails itself is unchecked, and said: a broken check must not
stop a run that would work. A step that fails ends the run, which takes it nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megasft.checks.run import memory, parameters
from megasft.checks.run.finding import Finding, Hit, Report, in_order
from megasft.checks.run.rules import RULES, Rule, Stage
from megasft.checks.run.subject import Subject
from megasft.errors import MegasftError
from megasft.severity import Severity, Unchecked

logger = logging.getLogger(__name__)

_OURS = logging.getLogger("megasft")


@dataclass(slots=True)
class Examination:
    """One pass over rules and steps.

    Attributes:
        subject: The run.
        in_run: Leave out notes, and what the run says by itself.
    """

    subject: Subject
    in_run: bool
    _findings: list[Finding] = field(default_factory=list)
    _unchecked: list[Unchecked] = field(default_factory=list)
    _num_rules: int = 0

    @property
    def has_errors(self) -> bool:
        """Whether a rule of severity error has fired."""
        return any(finding.severity is Severity.ERROR for finding in self._findings)

    def has(self, rule: str) -> bool:
        """Say whether a rule has fired."""
        return any(finding.rule == rule for finding in self._findings)

    def ask(self, stage: Stage) -> None:
        """Run the rules of a stage."""
        for name, rule in _rules_of(stage).items():
            if rule.check is not None:
                self._ask(name, rule, rule.check)

    def skip(self, stage: Stage, why: str) -> None:
        """Leave the rules and steps of a stage unchecked."""
        self._unchecked.append(Unchecked(tuple(_rules_of(stage)), why))

    def take(self, name: str, step: Callable[[], None], *, is_said: bool = False) -> bool:
        """Take a step, and say whether it went well; a refusal is an error of the rule named so.

        Args:
            name: Of a rule without a check.
            step: Raises a ``MegasftError`` where it refuses.
            is_said: Do not repeat its refusal.
        """
        refusal = None
        with _warnings_of_ours(pass_on=self.in_run) as logged:
            try:
                step()
            except MegasftError as error:
                refusal = Hit.from_message(str(error))
        self._num_rules += 1
        if refusal is not None and not is_said:
            self._found(name, Severity.ERROR, [refusal])
        self._found(name, Severity.WARNING, map(Hit.from_message, logged))
        return refusal is None

    def say(self, name: str, fact: str) -> None:
        """Add a note, which is the doctor's, under the name of a rule without a check."""
        if not self.in_run:
            self._found(name, Severity.NOTE, [Hit(fact)])

    def report(self) -> Report:
        """Return everything found so far, errors first, in the order of the table of rules."""
        position = {name: number for number, name in enumerate(RULES)}
        findings = sorted(self._findings, key=lambda finding: position[finding.rule])
        return Report(
            in_order(findings), tuple(self._unchecked), self._num_rules, _facts(self.subject)
        )

    def _ask(self, name: str, rule: Rule, check: Callable[[Subject], Iterable[Hit]]) -> None:
        if self.in_run and rule.severity is Severity.NOTE:
            return
        with _warnings_of_ours() as logged:
            try:
                hits = list(check(self.subject))
            except Exception as error:  # see the module's docstring
                why = f"the check failed ({type(error).__name__}: {error})"
                self._unchecked.append(Unchecked((name,), why))
                logger.debug("rule %s", name, exc_info=True)
                return
        self._num_rules += 1
        if self.in_run and rule.announced:
            return
        self._found(name, rule.severity, hits)
        self._found(name, Severity.WARNING, map(Hit.from_message, logged))

    def _found(self, name: str, severity: Severity, hits: Iterable[Hit]) -> None:
        theme = RULES[name].theme
        self._findings += [
            Finding(name, theme, severity, hit.fact, hit.remedy, dict(hit.numbers)) for hit in hits
        ]


def _rules_of(stage: Stage) -> dict[str, Rule]:
    return {name: rule for name, rule in RULES.items() if rule.stage is stage}


def _facts(subject: Subject) -> dict[str, Any]:
    """Return what the report shows beside findings."""
    facts: dict[str, Any] = {"machine": subject.machine.as_json()}
    if subject.validated is None:
        return facts
    args = subject.settled
    found = memory.estimate(args, subject.config.transformer)
    facts["layout"] = {
        "world_size": args.world_size,
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "cp": args.context_parallel_size,
        "dp": args.data_parallel_size,
        "ep": args.expert_model_parallel_size,
    }
    facts["parameters"] = parameters.of_model(args).total
    facts["memory"] = None if found is None else found.as_json()
    facts["gpu_memory"] = memory.available(subject)
    return facts


class _Collector(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _warnings_of_ours(*, pass_on: bool = False) -> Iterator[list[str]]:
    """Collect what our loggers would print meanwhile, or let them print; a check announces nothing.

    Args:
        pass_on: Let them print.
    """
    collector, handlers, propagates = _Collector(), _OURS.handlers[:], _OURS.propagate
    if pass_on:
        yield collector.messages
        return
    _OURS.handlers[:], _OURS.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        _OURS.handlers[:], _OURS.propagate = handlers, propagates
