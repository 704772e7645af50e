"""What a rule is made of, and how findings of all rules are ordered, counted and written."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from megasft.checks.engine import (
    Finding,
    Report,
    Severity,
    Unchecked,
    ask,
    in_order,
    rule,
    rules_of,
)

E, W, N = Severity


@rule("too-large", W, "sizes", theme="theme")
def too_large(size: int) -> Iterator[Finding]:
    """A size above 2: it would not fit,
    whatever is done.

    This is why.

    Remedy: take a smaller one; or
    two of them
    """
    if size > 2:
        yield Finding(f"{size} is above 2", "halve it", {"size": size})
        yield Finding()


def test_a_rule_is_what_its_docstring_says() -> None:
    assert too_large.meaning == "a size above 2: it would not fit, whatever is done"
    assert too_large.remedy == "take a smaller one; or two of them"
    assert (too_large.name, too_large.severity, too_large.needs) == ("too-large", W, ("sizes",))


@pytest.mark.parametrize(
    ("docstring", "meaning"),
    [
        ("TP does not divide the ranks.", "TP does not divide the ranks"),
        ("InfiniBand may not lock its buffers.", "InfiniBand may not lock its buffers"),
        ("/dev/shm is too small.", "/dev/shm is too small"),
        ("A size below 1.", "a size below 1"),
        ("Few files may be open at once.", "few files may be open at once"),
    ],
)
def test_names_keep_their_capitals(docstring: str, meaning: str) -> None:
    def check() -> Iterator[Finding]:
        yield Finding()

    check.__doc__ = docstring
    assert rule("name", E)(check).meaning == meaning


def test_what_a_finding_leaves_out_is_what_the_rule_says() -> None:
    own, left_out = ask(too_large, 3)
    assert (own.rule, own.severity, own.theme) == ("too-large", W, "theme")
    assert own.message == "3 is above 2; halve it"
    assert left_out.message == f"{too_large.meaning}; {too_large.remedy}"
    assert ask(too_large, 2) == []


def test_rules_stand_in_the_order_of_their_definition() -> None:
    first, second = ModuleType("first"), ModuleType("second")
    for module, names in ((first, "ba"), (second, "dc")):
        for name in names:
            setattr(module, name, rule(name, E)(too_large.check or print))
        module.__dict__["other"] = print
    assert list(rules_of(second, first)) == ["d", "c", "b", "a"]


def test_errors_come_first_then_what_is_most_frequent_and_others_as_they_were_found() -> None:
    def counted(name: str, count: int) -> Finding:
        return Finding(rule=name, severity=W, count=count, population=10, unit="turns")

    plain = [Finding(rule=name, severity=severity) for name, severity in (("z", W), ("y", E))]
    found = in_order([*plain, counted("b", 2), counted("a", 2), counted("c", 9)])
    assert [finding.rule for finding in found] == ["y", "c", "a", "b", "z"]
    assert [f.rule for f in in_order([Finding(rule="b"), Finding(rule="a")])] == ["b", "a"]


def fields(**changes: Any) -> set[str]:
    return set(Finding("fact", "remedy", {"n": 1}, **changes).as_json())


def test_json_has_the_fields_of_what_was_looked_at() -> None:
    assert fields() == {"rule", "severity", "remedy", "theme", "fact", "numbers"}
    assert fields(unit="turns") == {
        *("rule", "severity", "remedy", "meaning", "detail", "count", "population", "unit"),
        *("examples", "sampled", "share"),
    }
    run = Report((), facts={"machine": {}}).as_json()
    assert set(run) == {"facts", "verdict", "rules_checked", "findings", "unchecked"}
    counts = {"samples": 0, "turns": 0, "tokens": 0}
    data = Report((), subject="store", counts=counts).as_json()
    assert set(data) == {*run, "subject", "counts"} - {"facts"}


def test_the_verdict_counts_findings_and_what_was_not_checked_once() -> None:
    unchecked = (Unchecked(("a", "b"), "x"), Unchecked(("b",), "y"))
    report = Report((Finding(severity=W), Finding(severity=N)), unchecked, 7)
    assert report.verdict() == "0 errors, 1 warning, 1 note; 7 rules checked, 2 not"
    assert not report.fails() and report.fails(strict=True)
    assert Report((Finding(severity=E),)).fails()
