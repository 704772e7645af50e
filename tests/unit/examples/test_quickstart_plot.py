"""The quickstart's loss plot: two runs in one folder become one curve."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tests.unit.examples.conftest import LoadScript


@pytest.fixture
def script(load_script: LoadScript) -> ModuleType:
    return load_script("6_plot_loss.py")


def write_events(folder: Path, tag: str, points: dict[int, float], *, seconds: int) -> None:
    """Write one event file, named as if written ``seconds`` after the first."""
    writer = EventFileWriter(str(folder))
    for step, value in points.items():
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=float(seconds), step=step, summary=summary))
    writer.close()
    written = next(p for p in folder.iterdir() if not p.name.endswith(".renamed"))
    written.rename(folder / f"events.out.tfevents.{1_000 + seconds}.host.renamed")


def test_two_event_files_are_merged_by_step_and_the_later_wins(
    script: ModuleType, tmp_path: Path
) -> None:
    write_events(tmp_path, "lm loss", {1: 8.0, 2: 7.0, 3: 6.5}, seconds=0)
    write_events(tmp_path, "lm loss", {3: 6.0, 4: 5.0}, seconds=60)
    write_events(tmp_path, "lm loss validation", {4: 5.5}, seconds=120)
    assert script.read_curves(tmp_path) == {
        "lm loss": {1: 8.0, 2: 7.0, 3: 6.0, 4: 5.0},
        "lm loss validation": {4: 5.5},
    }


def test_last_lines_are_first_and_last_loss(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_events(tmp_path, "lm loss", {s: 8.0 / s for s in range(1, 5)}, seconds=0)
    png = tmp_path / "plots" / "loss.png"
    flags = ["--tensorboard", str(tmp_path), "--output", str(png), "--mark", "2:TP 2 -> DP 2"]
    monkeypatch.setattr(sys, "argv", ["6_plot_loss.py", *flags])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "first loss 8.0000 at step 1",
        "last loss 2.0000 at step 4, 0.25 of the first",
    ]
    assert any("after step 2: TP 2 -> DP 2" in line for line in lines)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_chart_has_a_bar_per_step_scaled_to_the_largest(script: ModuleType) -> None:
    chart = list(script.text_chart({1: 4.0, 2: 2.0, 3: 1.0}, []))
    bars = [line.split("│")[1] for line in chart if "│" in line]
    assert len(bars) == 12
    heights = ["".join(column).count("█") for column in zip(*bars, strict=True)]
    assert heights == [12, 6, 3]


def test_a_single_step_is_drawn(script: ModuleType) -> None:
    assert any("█" in line for line in script.text_chart({7: 1.5}, [script.Mark(7, "end")]))


def test_folder_without_events_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--tensorboard", str(tmp_path), "--output", str(tmp_path / "loss.png")]
    monkeypatch.setattr(sys, "argv", ["6_plot_loss.py", *flags])
    with pytest.raises(SystemExit, match="holds no event file with the scalar 'lm loss'"):
        script.main()
