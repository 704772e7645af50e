"""``megasft prove`` as its user runs it: it holds, and it fails when something is broken."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megasft.cli.main import app
from megasft.errors import FlagError
from megasft.megatron import cpu

pytestmark = pytest.mark.slow


def run(folder: Path, *flags: str, layouts: str = "CP 2") -> tuple[int, str]:
    outputs = ("--report", str(folder / "proof.md"), "--json", str(folder / "proof.json"))
    quick = ("--model", "qwen3", "--layouts", layouts, "--max-ranks", "2")
    result = CliRunner().invoke(app, ["prove", *quick, *outputs, *flags])
    if isinstance(result.exception, FlagError):
        raise result.exception
    return result.exit_code, result.output


def test_it_holds_and_leaves_a_report(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--loss", "turn", "--loss", "dft")

    assert code == 0, output
    assert output.startswith("6 runs on up to 2 ranks, about 1 minute on ")
    assert "exact: 6 runs on 3 layouts" in " ".join(output.split())
    verdicts = json.loads((tmp_path / "proof.json").read_text())
    assert len(verdicts) == 6 and all(v["is_exact"] for v in verdicts)
    assert all(v["gradient_error"] > 0 for v in verdicts)
    report = (tmp_path / "proof.md").read_text()
    assert "turn, DFT 0.8" in report and "most threads of a rank's process" in report


@pytest.mark.parametrize("defect", ["cp-seam", "double-count", "per-row-mean", "token-divisor"])
def test_a_known_defect_makes_it_exit_1(tmp_path: Path, defect: str) -> None:
    code, output = run(tmp_path, "--break", defect, layouts="gather")

    assert code == 1, output
    verdicts = json.loads((tmp_path / "proof.json").read_text())
    assert not any(v["is_exact"] for v in verdicts)
    assert all(v["failure"] == "" and v["gradient_error"] > 1e-3 for v in verdicts)


def test_a_defect_that_cannot_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="raise --max-ranks to 2"):
        run(tmp_path, "--break", "cp-seam", "--layouts", "", "--max-ranks", "1")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if not cpu.is_needed():
        pytest.skip("there is a CUDA device")
    with pytest.raises(FlagError, match="no CUDA device here"):
        run(tmp_path, "--device", "cuda")
