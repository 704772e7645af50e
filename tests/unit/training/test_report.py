import logging

import pytest

from megasft.report.record import Record
from megasft.training.report import Report
from tests.unit.report.records import STEP


class Flaky:
    """A sink that fails from its second step on."""

    def __init__(self) -> None:
        self.steps = 0

    def write(self, _record: Record) -> None:
        self.steps += 1
        if self.steps > 1:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError


def test_a_sink_that_fails_is_left_out_with_a_warning_and_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megasft"), "propagate", True)
    report = Report.__new__(Report)
    flaky, sound = Flaky(), Flaky()
    sound.steps = -9
    report._sinks = [flaky, sound]
    for _ in range(3):
        report._write(lambda sink: sink.write(STEP))
    assert (flaky.steps, sound.steps) == (2, -6)
    assert report._sinks == [sound]
    assert "Flaky: OSError: [Errno 28] No space left on device; nothing more is written" in (
        caplog.text
    )
