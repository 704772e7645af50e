"""How rules are asked: stages, what a run leaves out, and rules that fail themselves."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.checks import run as folder
from megasft.checks.engine import Finding, Rule, Severity, rule
from megasft.checks.run import run
from megasft.checks.run.machine import look
from megasft.checks.run.run import RULES
from megasft.checks.run.subject import Stage, Subject, Wishes
from megasft.errors import PlanError

Asked = Rule[..., Any]


def says(severity: Severity, *facts: str, announced: bool = False) -> Asked:
    @rule("says", severity, Stage.FLAGS, theme="theme", announced=announced)
    def check(subject: Subject) -> Iterator[Finding]:
        """A sentence."""
        yield from map(Finding, facts)

    return check


def fails(stage: Stage) -> Asked:
    @rule("fails", Severity.ERROR, stage, theme="theme")
    def check(subject: Subject) -> Iterable[Finding]:
        """A sentence."""
        raise KeyError("a flag that is not there")

    return check


def examination(
    monkeypatch: pytest.MonkeyPatch, *, in_run: bool, **rules: Asked
) -> run.Examination:
    named = {name: replace(made, name=name) for name, made in rules.items()}
    monkeypatch.setattr(run, "RULES", named)
    return run.Examination(Subject(look(), Wishes(), SimpleNamespace()), in_run)


def ask(monkeypatch: pytest.MonkeyPatch, *, in_run: bool, **rules: Asked) -> Any:
    asked = examination(monkeypatch, in_run=in_run, **rules)
    asked.ask(Stage.FLAGS)
    return asked.report()


E, W, N = Severity


def test_every_rule_has_a_theme_and_says_what_it_finds() -> None:
    assert all(rule.theme and rule.meaning[-1] != "." for rule in RULES.values())
    assert not [rule.name for rule in RULES.values() if rule.meaning.startswith("find ")]
    assert {rule.needs for rule in RULES.values()} == {(stage,) for stage in Stage}


def test_every_rule_of_the_folder_is_in_the_table() -> None:
    names = [f"{folder.__name__}.{module.name}" for module in pkgutil.iter_modules(folder.__path__)]
    modules = [importlib.import_module(name) for name in names]
    made = [x for module in modules for x in vars(module).values() if isinstance(x, Rule)]
    assert len(made) == len(RULES) and {rule.name for rule in made} == set(RULES)


def test_errors_come_first_and_notes_are_the_doctors(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"n": says(N, "a"), "w": says(W, "c"), "e": says(E, "d; e", "f")}

    found = ask(monkeypatch, in_run=False, **rules).findings
    assert [(f.rule, f.severity, f.fact) for f in found] == [
        ("e", E, "d; e"),
        ("e", E, "f"),
        ("w", W, "c"),
        ("n", N, "a"),
    ]
    in_run = ask(monkeypatch, in_run=True, **rules)
    assert [f.rule for f in in_run.findings] == ["e", "e", "w"]
    assert in_run.num_rules == 2


def test_what_a_run_announces_itself_is_not_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"w": says(W, "a", announced=True), "e": says(E, "b")}
    assert [f.rule for f in ask(monkeypatch, in_run=False, **rules).findings] == ["e", "w"]
    assert [f.rule for f in ask(monkeypatch, in_run=True, **rules).findings] == ["e"]


def test_a_check_that_fails_stops_nothing_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    report = ask(monkeypatch, in_run=True, f=fails(Stage.FLAGS), e=says(E, "b"))
    assert [f.rule for f in report.findings] == ["e"]
    assert report.unchecked[0].rules == ("f",)
    assert "KeyError: 'a flag that is not there'" in report.unchecked[0].why


STEP = Rule("step", E, (Stage.SETTLE,), "meaning", "theme")


@pytest.mark.parametrize("in_run", [False, True])
def test_what_a_step_refuses_is_an_error_of_its_rule_in_all_its_words(
    monkeypatch: pytest.MonkeyPatch, in_run: bool
) -> None:
    def refuses() -> Iterator[str]:
        yield "beside it; mind that"
        raise PlanError("no row; add one")

    asked = examination(monkeypatch, in_run=in_run, s=STEP)
    assert asked.take("s", refuses) is False and asked.has_errors and asked.has("s")
    found = [(f.rule, f.severity, f.message) for f in asked.report().findings]
    assert found == [("s", E, "no row; add one"), ("s", W, "beside it; mind that")]


def test_what_a_step_warns_of_is_a_warning_of_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examination(monkeypatch, in_run=True, s=STEP)
    assert asked.take("s", lambda: ["mind that"]) and asked.take("s", lambda: None)
    assert [(f.severity, f.theme, f.fact) for f in asked.report().findings] == [
        (W, "theme", "mind that")
    ]
    assert not asked.has_errors and asked.report().num_rules == 2


def test_a_step_whose_refusal_is_said_already_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses() -> list[str]:
        raise PlanError("no row; add one")

    asked = examination(monkeypatch, in_run=True, s=STEP)
    assert asked.take("s", refuses, is_said=True) is False
    assert not asked.report().findings


def test_a_step_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examination(monkeypatch, in_run=True, s=STEP)
    with pytest.raises(KeyError):
        asked.take("s", lambda: {}["no such flag"])


def test_stages_that_cannot_be_reached_are_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examination(monkeypatch, in_run=False, e=says(E, "b"), later=fails(Stage.MODEL))
    asked.ask(Stage.FLAGS)
    asked.skip(Stage.MODEL, "there is none")
    report = asked.report()
    assert [item.rules for item in report.unchecked] == [("later",)]
    assert report.num_rules == 1
    assert report.verdict() == "1 error, 0 warnings, 0 notes; 1 rules checked, 1 not"
