"""How rules are asked: stages, what a run leaves out, and rules that fail themselves."""

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megasft.checks.run import run
from megasft.checks.run.finding import Hit
from megasft.checks.run.machine import look
from megasft.checks.run.rules import RULES, Rule, Stage
from megasft.checks.run.subject import Subject, Wishes
from megasft.errors import PlanError
from megasft.severity import Severity

logger = logging.getLogger("megasft.some.check")


def rule(severity: Severity, *messages: str, announced: bool = False) -> Rule:
    def check(subject: Subject) -> Iterable[Hit]:
        return map(Hit.from_message, messages)

    return Rule(severity, Stage.FLAGS, "theme", "meaning", check, announced)


def logs(subject: Subject) -> Iterable[Hit]:
    logger.warning("said by %s; do this", "a check")
    return ()


def fails(subject: Subject) -> Iterable[Hit]:
    raise KeyError("a flag that is not there")


def examination(rules: dict[str, Rule], monkeypatch: pytest.MonkeyPatch, *, in_run: bool) -> Any:
    monkeypatch.setattr(run, "RULES", rules)
    return run.Examination(Subject(look(), Wishes(), SimpleNamespace()), in_run)


def ask(rules: dict[str, Rule], monkeypatch: pytest.MonkeyPatch, *, in_run: bool) -> Any:
    asked = examination(rules, monkeypatch, in_run=in_run)
    asked.ask(Stage.FLAGS)
    return asked.report()


E, W, N = Severity


def test_every_rule_has_a_theme_and_says_what_it_finds() -> None:
    assert all(rule.theme and rule.meaning[-1] != "." for rule in RULES.values())
    checks = [rule.check for rule in RULES.values() if rule.check is not None]
    assert len(set(checks)) == len(checks)
    assert {rule.stage for rule in RULES.values()} == set(Stage)


def test_errors_come_first_and_notes_are_the_doctors(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"n": rule(N, "a; b"), "w": rule(W, "c"), "e": rule(E, "d; e; f")}

    found = ask(rules, monkeypatch, in_run=False).findings
    assert [(f.rule, f.fact, f.remedy) for f in found] == [
        ("e", "d; e", "f"),
        ("w", "c", ""),
        ("n", "a", "b"),
    ]
    assert [f.rule for f in ask(rules, monkeypatch, in_run=True).findings] == ["e", "w"]


def test_what_a_run_announces_itself_is_not_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"w": rule(W, "a", announced=True), "e": rule(E, "b")}
    assert [f.rule for f in ask(rules, monkeypatch, in_run=False).findings] == ["e", "w"]
    assert [f.rule for f in ask(rules, monkeypatch, in_run=True).findings] == ["e"]


def test_what_a_check_logs_is_a_warning_of_it_and_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging_rule = Rule(E, Stage.FLAGS, "theme", "meaning", logs)
    (finding,) = ask({"l": logging_rule}, monkeypatch, in_run=True).findings
    assert (finding.severity, finding.message) == (W, "said by a check; do this")
    assert not caplog.messages


def test_a_check_that_fails_stops_nothing_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"f": Rule(E, Stage.FLAGS, "theme", "meaning", fails), "e": rule(E, "b")}
    report = ask(rules, monkeypatch, in_run=True)
    assert [f.rule for f in report.findings] == ["e"]
    assert report.unchecked[0].rules == ("f",)
    assert "KeyError: 'a flag that is not there'" in report.unchecked[0].why


STEP = Rule(E, Stage.SETTLE, "theme", "meaning")


def refuses() -> None:
    logger.warning("beside it; mind that")
    raise PlanError("no row; add one")


def test_what_a_step_refuses_is_an_error_of_its_rule(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a run, which takes the step but once, its warnings go where they always go."""
    asked = examination({"s": STEP}, monkeypatch, in_run=False)
    assert asked.take("s", refuses) is False and asked.has_errors and asked.has("s")
    found = [(f.severity, f.fact, f.remedy) for f in asked.report().findings]
    assert found == [(E, "no row", "add one"), (W, "beside it", "mind that")]
    assert not caplog.messages
    asked = examination({"s": STEP}, monkeypatch, in_run=True)
    assert asked.take("s", refuses) is False
    assert [f.severity for f in asked.report().findings] == [E]
    assert caplog.messages == ["beside it; mind that"]


def test_a_step_whose_refusal_is_said_already_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = examination({"s": STEP}, monkeypatch, in_run=True)
    assert asked.take("s", refuses, is_said=True) is False
    assert not asked.report().findings


def test_a_step_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examination({"s": STEP}, monkeypatch, in_run=True)
    with pytest.raises(KeyError):
        asked.take("s", lambda: {}["no such flag"])


def test_stages_that_cannot_be_reached_are_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Rule(E, Stage.MODEL, "theme", "meaning", fails)
    asked = examination({"e": rule(E, "b"), "later": later}, monkeypatch, in_run=False)
    asked.ask(Stage.FLAGS)
    asked.skip(Stage.MODEL, "there is none")
    report = asked.report()
    assert [item.rules for item in report.unchecked] == [("later",)]
    assert cast(Any, report).num_rules == 1
