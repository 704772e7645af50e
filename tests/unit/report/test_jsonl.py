import json
from dataclasses import replace
from pathlib import Path

import pytest

from megasft.errors import FlagError
from megasft.report.jsonl import Jsonl, has_evaluation
from megasft.report.sink import Setup

from .records import VALIDATION, step


def lines(path: Path) -> list[int]:
    return [json.loads(line)["steps"] for line in path.read_text().splitlines()]


def run(folder: Path, *steps: int, loss: float = 1.25) -> None:
    sink = Jsonl(Setup(folder=folder))
    for number in steps:
        sink.write(step(number, loss=loss))
    sink.close()


def test_each_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    sink = Jsonl(Setup(folder=tmp_path / "log"))
    path = tmp_path / "log" / "steps.jsonl"
    for number in (1, 2):
        sink.write(step(number))
        assert lines(path)[-1] == number and path.read_bytes().endswith(b"}\n")
    sink.write(VALIDATION)
    assert lines(path) == [1, 2, 2]
    assert json.loads(path.read_text().splitlines()[-1])["validation"]["none"] is None


def test_a_resumed_run_replaces_the_steps_it_trains_again(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, 3, 4)
    run(tmp_path, 3, 4, 5, loss=0.5)
    path = tmp_path / "steps.jsonl"
    assert lines(path) == [1, 2, 3, 4, 5]
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert losses == [1.25, 1.25, 0.5, 0.5, 0.5]
    assert lines(tmp_path / "steps.jsonl.before") == [1, 2, 3, 4]


def test_a_run_that_goes_on_where_the_last_one_ended_copies_nothing(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    run(tmp_path, 3)
    assert lines(tmp_path / "steps.jsonl") == [1, 2, 3]
    assert not (tmp_path / "steps.jsonl.before").exists()


@pytest.mark.parametrize("rest", [b'{"steps": 3, "lo', b"\x00\x00", b'{"steps": 3}', b"[]\n"])
def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path: Path, rest: bytes) -> None:
    run(tmp_path, 1, 2)
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(rest)
    run(tmp_path, 3)
    assert lines(tmp_path / "steps.jsonl") == [1, 2, 3]


def test_an_evaluation_before_the_first_step_keeps_the_steps_before_it(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, 3)
    sink = Jsonl(Setup(folder=tmp_path))
    sink.write(VALIDATION)
    assert lines(tmp_path / "steps.jsonl") == [1, 2, 2]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlagError, match=r"--megasft-log-dir .*file/log cannot be made"):
        Jsonl(Setup(folder=tmp_path / "file" / "log"))


def test_a_run_that_only_evaluates_removes_no_step(tmp_path: Path) -> None:
    """Maybe it evaluates an older checkpoint."""
    run(tmp_path, 1, 2, 3)
    for steps, expected in ((2, [1, 2, 3, 2]), (1, [1, 2, 3, 2, 1])):
        sink = Jsonl(Setup(folder=tmp_path, trains=False))
        sink.write(replace(VALIDATION, step=steps))
        sink.close()
        assert lines(tmp_path / "steps.jsonl") == expected
    assert not (tmp_path / "steps.jsonl.before").exists()


def test_an_evaluation_is_found_by_its_step_and_its_stores(tmp_path: Path) -> None:
    names = tuple(VALIDATION.sets)
    assert not has_evaluation(tmp_path, step=2, names=names)
    run(tmp_path, 1, 2)
    sink = Jsonl(Setup(folder=tmp_path))
    sink.write(replace(VALIDATION, step=2))
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"steps": 3, "validation": {"no')
    assert has_evaluation(tmp_path, step=2, names=names)
    assert not has_evaluation(tmp_path, step=1, names=names), "it was trained, not evaluated"
    assert not has_evaluation(tmp_path, step=3, names=names), "a line without its end"
    assert not has_evaluation(tmp_path, step=2, names=[*names, "more"])


def test_an_evaluation_cuts_off_a_line_without_its_end(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"steps": 3, "lo')
    sink = Jsonl(Setup(folder=tmp_path))
    sink.write(VALIDATION)
    assert lines(tmp_path / "steps.jsonl") == [1, 2, VALIDATION.step]
