from collections.abc import Callable
from pathlib import Path

import pytest

from megasft import compat
from tests.unit.report.test_curves import run

from .conftest import Seen

Megasft = Callable[..., Seen]


@pytest.mark.slow
def test_several_runs_make_one_picture(tmp_path: Path, megasft: Megasft) -> None:
    one = run(tmp_path / "turn" / "log", *(3.0 - n / 50 for n in range(100)))
    two = run(tmp_path / "token" / "log", 2.5)
    png = tmp_path / "made" / "runs.png"

    seen = megasft("plot", one, two, "--output", png)

    assert seen.code == 0
    assert "turn: 100 steps, 1 to 100, loss 3.0000 -> 1.0200\n" in seen.out
    # Eight quantities and two categories.
    assert seen.out.endswith(f"{png}: 10 panels\n")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert megasft("plot", one, "-o", png, "--most-categories", 0).out.endswith("8 panels\n")


def test_a_folder_without_a_run_and_a_missing_package_say_what_to_do(
    tmp_path: Path, megasft: Megasft, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = megasft("plot", tmp_path)
    assert seen.code == 1 and "has no steps.jsonl" in seen.err
    monkeypatch.setattr(compat, "has", lambda package: package != "matplotlib")
    seen = megasft("plot", tmp_path)
    assert seen.code == 1 and "pip install megasft[plot]" in seen.err
