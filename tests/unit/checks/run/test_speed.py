from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import orjson
import pytest

from megasft.checks.run import speed
from megasft.checks.run.speed import Work
from megasft.checks.run.subject import Subject, Wishes
from megasft.packing.balance import Cost


def run_of(**changes: Any) -> Subject:
    flags = {"megasft_log_dir": None, "save": None, "megasft_peak_tflops": None, "world_size": 4}
    settled = SimpleNamespace(**(flags | {"global_batch_size": 2} | changes))
    plan = SimpleNamespace(
        row_tokens=100,
        squares=np.array([5000, 3000, 2000, 2000]),
        tokens=np.array([90, 100, 80, 90]),
        num_packings=2,
        epoch_rows=2.0,
    )
    data = SimpleNamespace(train=SimpleNamespace(plan=plan))
    machine = SimpleNamespace(gpus=())
    return cast(
        Subject, SimpleNamespace(settled=settled, data=data, machine=machine, wishes=Wishes())
    )


@pytest.fixture(autouse=True)
def cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.row_order, "cost_of", lambda _: Cost(per_token=10, per_square=1))


def test_work_is_that_of_one_epoch_whatever_the_packings() -> None:
    assert speed.work_of_epoch(run_of()) == Work(tokens=180.0, operations=(4000 + 12000) / 2)


def test_a_stated_speed_gives_the_hours_of_all_ranks() -> None:
    subject = run_of()
    subject.wishes = Wishes(tokens_per_second=0.0125)
    (hit,) = speed.duration(subject)
    # 180 tokens / (0.0125 * 4 ranks) = 3600 s, of one iteration of two rows
    assert hit.numbers["hours"] == 1.0
    assert "1.0 hours on 4 ranks" in hit.fact and "an iteration 3.6e+03 s" in hit.fact


def test_an_earlier_run_is_measured_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    lines = [{"tokens_per_second": rate} for rate in (5.0, 7.0, 1000.0)] + [{"validation": {}}]
    (tmp_path / "steps.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)) + b'\n{"tok')
    work = Work(1.0, 1.0)

    found = speed.rate(run_of(megasft_log_dir=str(tmp_path)), work)

    assert found is not None and found.tokens_per_second == 7.0
    assert found.source == f"measured, {tmp_path}/steps.jsonl, 3 steps"
    assert speed.rate(run_of(megasft_log_dir=str(tmp_path / "none")), work) is None


def test_without_a_measurement_the_peak_and_its_use_are_assumed_and_said() -> None:
    found = speed.rate(run_of(megasft_peak_tflops=100.0), Work(tokens=2.0, operations=4e12))
    assert found is not None and found.tokens_per_second == pytest.approx(20.0)
    assert found.source == "assumed: 40 % of 100 TFLOP/s"


def test_where_nothing_is_known_the_operations_are_said() -> None:
    (hit,) = speed.duration(run_of())
    assert "8e+03 operations, 44.4 a token" in hit.fact and "--tokens-per-second" in hit.remedy
