"""Asks all rules of a run, stage by stage; stops a run on errors and prints its warnings once.

A run asks the same rules as ``megasft doctor``, on every rank, because each rank has its own
machine; rank 0 prints. A stage that cannot be reached (a store that does not open) leaves its rules
unchecked, which is said. A rule that fails itself is unchecked too, and said: a broken check must
not stop a run that would work, but for the checks that a run makes nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megasft.errors import FlagError
from megasft.severity import Severity, Unchecked
from megasft.training.datasets import RunData
from megasft.training.preflight import machine, memory, parameters
from megasft.training.preflight.finding import Finding, Hit, Report, in_order
from megasft.training.preflight.rules import RULES, Rule, Stage
from megasft.training.preflight.subject import Subject, Wishes

logger = logging.getLogger(__name__)

_OURS = logging.getLogger("megasft")


@dataclass(slots=True)
class _Examination:
    """One pass over all rules."""

    subject: Subject
    in_run: bool
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)
    num_rules: int = 0

    @property
    def has_errors(self) -> bool:
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    def ask(self, stage: Stage) -> None:
        """Run the rules of a stage."""
        for name, rule in _rules_of(stage).items():
            self._ask(name, rule)

    def skip(self, stage: Stage, why: str) -> None:
        self.unchecked.append(Unchecked(tuple(_rules_of(stage)), why))

    def _ask(self, name: str, rule: Rule) -> None:
        if self.in_run and rule.severity is Severity.NOTE:
            return
        had_errors = self.has_errors
        with _warnings_of_ours() as logged:
            try:
                hits = list(rule.check(self.subject))
            except Exception as error:  # see the module's docstring
                if rule.essential:
                    raise
                why = f"the check failed ({type(error).__name__}: {error})"
                self.unchecked.append(Unchecked((name,), why))
                logger.debug("rule %s", name, exc_info=True)
                return
        self.num_rules += 1
        if rule.stage is Stage.SETTLE and had_errors:
            return  # Megatron says again, in its own words, what was found already
        is_said_later = self.in_run and rule.announced
        if not (is_said_later and rule.severity is Severity.WARNING):
            self._found(name, rule, rule.severity, hits)
        if not is_said_later:
            self._found(name, rule, Severity.WARNING, map(Hit.from_message, logged))

    def _found(self, name: str, rule: Rule, severity: Severity, hits: Any) -> None:
        self.findings += [
            Finding(name, rule.theme, severity, hit.fact, hit.remedy, dict(hit.numbers))
            for hit in hits
        ]


def examine(subject: Subject, *, in_run: bool = False) -> Report:
    """Ask all rules.

    Args:
        subject: The run; its flags and machine. The rest of it is filled in.
        in_run: Leave out notes, and what the run says by itself.
    """
    asked = _Examination(subject, in_run)
    asked.ask(Stage.MACHINE)
    if subject.flags is None:
        return _report(asked)
    asked.ask(Stage.FLAGS)
    if any(finding.rule == "store" for finding in asked.findings):
        asked.skip(Stage.OPEN, "a store cannot be read")
    else:
        asked.ask(Stage.OPEN)
    if subject.opened is None:
        for stage in (Stage.DATA, Stage.SETTLE, Stage.MODEL):
            asked.skip(stage, "there are no rows, see the errors")
        return _report(asked)
    asked.ask(Stage.DATA)
    asked.ask(Stage.SETTLE)
    if subject.validated is None:
        asked.skip(Stage.MODEL, "Megatron does not accept the flags, see the errors")
    else:
        asked.ask(Stage.MODEL)
    return _report(asked)


def require(args: Any) -> RunData:
    """Check a run before it starts, and return the stores and rows it trains on.

    Args:
        args: Megatron's flags and ours, as parsed.

    Raises:
        FlagError: Something is wrong; all of it, with the remedies.
    """
    subject = Subject(machine.look(), Wishes(), args)
    report = examine(subject, in_run=True)
    for finding in report.of(Severity.WARNING):
        logger.warning("%s", finding.message)
    for item in report.unchecked if subject.validated is not None else ():
        logger.warning("not checked: %s, since %s", ", ".join(item.rules), item.why)
    errors = report.of(Severity.ERROR)
    if len(errors) == 1:
        raise FlagError(errors[0].message)
    if errors:
        listed = "\n".join(f"  {n}. {error.message}" for n, error in enumerate(errors, 1))
        raise FlagError(f"{len(errors)} things are wrong with this run:\n{listed}")
    return subject.data


def _rules_of(stage: Stage) -> dict[str, Rule]:
    return {name: rule for name, rule in RULES.items() if rule.stage is stage}


def _report(asked: _Examination) -> Report:
    position = {name: number for number, name in enumerate(RULES)}
    findings = sorted(asked.findings, key=lambda finding: position[finding.rule])
    return Report(
        in_order(findings), tuple(asked.unchecked), asked.num_rules, _facts(asked.subject)
    )


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
def _warnings_of_ours() -> Iterator[list[str]]:
    """Collect what our loggers would print meanwhile; a check is no announcement."""
    collector, handlers, propagates = _Collector(), _OURS.handlers[:], _OURS.propagate
    _OURS.handlers[:], _OURS.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        _OURS.handlers[:], _OURS.propagate = handlers, propagates
