from pathlib import Path

import pytest

from megasft.errors import DataError
from megasft.report.curves import names_of, read_run, read_runs, smooth
from megasft.report.jsonl import Jsonl
from megasft.report.sink import Setup

from .records import VALIDATION, step


def run(folder: Path, *losses: float, first: int = 1) -> Path:
    sink = Jsonl(Setup(folder=folder))
    for number, loss in enumerate(losses, start=first):
        sink.write(step(number, loss=loss))
    sink.write(VALIDATION)
    sink.close()
    return folder


def test_a_run_is_found_by_its_file_its_log_folder_and_its_save_folder(tmp_path: Path) -> None:
    log = run(tmp_path / "run" / "log", 3.0, 2.0)
    for path in (log, log.parent, log / "steps.jsonl"):
        curves = read_run(path, name="it")
        assert curves.train["loss"] == {1: 3.0, 2: 2.0}
        assert curves.train["grad_norm"] == {1: 0.75, 2: 0.75}
        assert list(curves.categories) == ["maths", "stem_zh/phy"], "most labels first"
        assert curves.valid == {"talk": {2: 1.25}}
    with pytest.raises(DataError, match=r"has no steps\.jsonl; give a run's --megasft-log-dir"):
        read_run(tmp_path, name="it")


def test_the_later_of_two_lines_of_a_step_counts_and_a_broken_line_is_passed_over(
    tmp_path: Path,
) -> None:
    first, again = run(tmp_path / "a", 3.0, 2.0), run(tmp_path / "b", 1.0, first=2)
    joined = (first / "steps.jsonl").read_bytes() + b'{"steps": 9, "lo\n'
    (first / "steps.jsonl").write_bytes(joined + (again / "steps.jsonl").read_bytes())
    assert read_run(first, name="a").train["loss"] == {1: 3.0, 2: 1.0}
    (first / "steps.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="holds no step yet"):
        read_run(first, name="a")


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert names_of([Path("runs/turn/log"), Path("runs/token/log")]) == ["turn", "token"]
    assert names_of([Path("a/x"), Path("b/y/z")]) == ["a/x", "b/y/z"]
    assert names_of([Path("runs/only")]) == ["only"]
    with pytest.raises(DataError, match="a run is given twice"):
        read_runs([tmp_path, tmp_path])


def test_smoothing_keeps_a_constant_and_every_step() -> None:
    curve = {n: 2.0 for n in (1, 2, 5, 9)}
    assert smooth(curve, window=3) == curve
    assert smooth({1: 4.0}, window=9) == {1: 4.0}
    rising = smooth({n: float(n) for n in range(10)}, window=5)
    assert rising[0] == 1.0 and rising[5] == 5.0 and rising[9] == 8.0
