from collections import Counter
from pathlib import Path

from tools.mutants import Mutant, Outcome, faults, read_table


def test_each_mutant_changes_a_text_that_is_there_once_and_names_a_test() -> None:
    """So what moves code or renames a test moves its mutant along."""
    table = read_table()
    assert len(table) >= 58
    assert [fault for mutant in table for fault in faults(mutant)] == []
    changes = Counter((mutant.file, mutant.old, mutant.new) for mutant in table)
    assert max(changes.values()) == 1


def test_what_does_not_fit_the_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    (tmp_path / "test_code.py").write_text("def test_a() -> None: ...\n")
    good = Mutant("X", "a is another", "code.py", "a = 1", "a = 2", "test_code.py::test_a[1-2]")
    assert list(faults(good, tmp_path)) == []
    wrong = {
        "holds '= 1' 2 times": Mutant("X", "", "code.py", "= 1", "= 2", good.test),
        "holds 'c = 1' 0 times": Mutant("X", "", "code.py", "c = 1", "c = 2", good.test),
        "there is no gone.py": Mutant("X", "", "gone.py", "a", "b", good.test),
        "are the same": Mutant("X", "", "code.py", "a = 1", "a = 1", good.test),
        "no test test_code.py::test_b": Mutant("X", "", *code(good), "test_code.py::test_b"),
        "no test gone.py::test_a": Mutant("X", "", *code(good), "gone.py::test_a"),
    }
    for message, mutant in wrong.items():
        (fault,) = faults(mutant, tmp_path)
        assert message in fault


def code(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.file, mutant.old, mutant.new


def test_a_program_that_does_not_run_is_not_taken_for_a_caught_defect() -> None:
    assert Outcome(1, ("E       assert 1 == 2",)).verdict == "caught"
    assert Outcome(1, ("    except NameError:\nE   assert 1 == 2",)).verdict == "caught"
    assert Outcome(1, ("x\nE       NameError: name 'a' is not defined",)).verdict.startswith(
        "BROKEN"
    )
    assert Outcome(0).verdict == "NOT CAUGHT"
    assert Outcome(2, ("E   AssertionError",)).verdict.startswith("BROKEN")
