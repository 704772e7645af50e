import sys
from pathlib import Path

import pytest

from megasft.errors import FlagError, MissingPackageError
from megasft.packing.balance import LLAMA_8B, BatchShape
from megasft.packing.forecast import Forecast, Run, forecast
from megasft.packing.forecast_plot import plot_forecast
from megasft.packing.plan import plan_rows
from tests.stores import random_samples, write_store


def seen(folder: Path, shape: BatchShape) -> Forecast:
    store = write_store(folder / "store", random_samples(60, seed=3))
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1)
    return forecast(store, plan, Run(shape, seed=1), LLAMA_8B)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [BatchShape(8, 2, 1), BatchShape(1, 1, 1), BatchShape(9, 2, 1)])
def test_a_picture_is_drawn_whatever_there_is_to_balance(shape: BatchShape, tmp_path: Path) -> None:
    plot_forecast(seen(tmp_path, shape), tmp_path / "plan.png")
    data = (tmp_path / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[k : k + 4], "big") for k in (16, 20))
    assert (width, height) == (1200, 840)


def test_one_sample_alone_is_drawn_too(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(1, seed=1))
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1)
    run = Run(BatchShape(2, 2, 1), seed=1)
    plot_forecast(forecast(store, plan, run, LLAMA_8B), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"plan\.png cannot be written \(No such file"):
        plot_forecast(seen(tmp_path, BatchShape(8, 2, 1)), tmp_path / "none" / "plan.png")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = seen(tmp_path, BatchShape(8, 2, 1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'megasft\[plot\]'"):
        plot_forecast(some, tmp_path / "plan.png")
    assert not (tmp_path / "plan.png").exists()
