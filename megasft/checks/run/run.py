"""Asks the rules of a run, stage by stage, and takes the steps between them.

A run asks the same rules as ``megasft doctor``, on every rank, because each rank has its own
machine; rank 0 prints. A rule that fails itself is unchecked, and said: a broken check must not
stop a run that would work. A step that fails ends the run, which takes it nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from megasft.checks.engine import (
    Finding,
    Report,
    Rule,
    Severity,
    Unchecked,
    ask,
    in_order,
    named,
    rules_of,
)
from megasft.checks.run import (
    attention,
    checkpoints,
    flags,
    machine,
    memory,
    parallel,
    parameters,
    resume,
    rows,
    speed,
    stores,
)
from megasft.checks.run.subject import Stage, Subject
from megasft.errors import MegasftError

logger = logging.getLogger(__name__)

RULES: Final = rules_of(
    machine, flags, parallel, stores, rows, attention, memory, checkpoints, resume, speed
)


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
        """Ask the rules of a stage."""
        for rule in _rules_of(stage):
            if rule.check is None or (self.in_run and rule.severity is Severity.NOTE):
                continue
            try:
                found = ask(rule, self.subject)
            except Exception as error:  # see the module's docstring
                why = f"the check failed ({type(error).__name__}: {error})"
                self._unchecked.append(Unchecked((rule.name,), why))
                logger.debug("rule %s", rule.name, exc_info=True)
                continue
            self._num_rules += 1
            if not (self.in_run and rule.announced):
                self._findings += found

    def skip(self, stage: Stage, why: str) -> None:
        """Leave the rules and steps of a stage unchecked."""
        self._unchecked.append(Unchecked(tuple(rule.name for rule in _rules_of(stage)), why))

    def take(
        self, name: str, step: Callable[[], Iterable[str] | None], *, is_said: bool = False
    ) -> bool:
        """Take a step, and say whether it went well; a refusal is an error of the rule named so.

        Args:
            name: Of a rule without a check.
            step: Returns what it warns of, if anything, and raises a ``MegasftError`` to refuse.
            is_said: Do not repeat its refusal.
        """
        self._num_rules += 1
        try:
            for warning in step() or ():
                self._findings.append(named(RULES[name], Finding(warning), Severity.WARNING))
        except MegasftError as error:
            if not is_said:
                self._findings.append(named(RULES[name], Finding(str(error))))
            return False
        return True

    def say(self, name: str, fact: str) -> None:
        """Add a note, which is the doctor's, under the name of a rule without a check."""
        if not self.in_run:
            self._findings.append(named(RULES[name], Finding(fact)))

    def report(self) -> Report:
        """Return everything found so far, errors first, in the order of the rules."""
        position = {name: number for number, name in enumerate(RULES)}
        findings = sorted(self._findings, key=lambda finding: position[finding.rule])
        return Report(
            in_order(findings), tuple(self._unchecked), self._num_rules, _facts(self.subject)
        )


def _rules_of(stage: Stage) -> list[Rule[..., Any]]:
    return [rule for rule in RULES.values() if stage in rule.needs]


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
