"""Ranks on Ray have what torchrun would give them, fail as they fail there, and start again."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasft.errors import MissingPackageError
from megasft.launch import ray_ranks
from megasft.launch.ray_actor import Seat
from megasft.launch.ray_ranks import rank_environments, run_on_ray
from megasft.launch.run import Run

ROOT = Path(__file__).resolve().parents[3]


def test_ranks_of_a_node_share_its_gpus_and_meet_at_rank_0() -> None:
    seats = [Seat("a", "10.0.0.1", ("2",)), Seat("a", "10.0.0.1", ("0",))]
    seats += [Seat("b", "10.0.0.2", ("1",)), Seat("b", "10.0.0.2", ("3",))]

    ranks = rank_environments(seats, {"HOME": "/h", "RANK": "9"}, port=1234)

    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "CUDA_VISIBLE_DEVICES")
    assert [[e[n] for n in names] for e in ranks] == [
        ["0", "0", "0", "2,0"],
        ["1", "1", "0", "2,0"],
        ["2", "0", "1", "1,3"],
        ["3", "1", "1", "1,3"],
    ]
    shared = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HOME")
    assert {tuple(e[n] for n in shared) for e in ranks} == {("4", "2", "10.0.0.1", "1234", "/h")}


def test_cpu_ranks_keep_their_gpus_hidden() -> None:
    (only,) = rank_environments([Seat("a", "h", ())], {"CUDA_VISIBLE_DEVICES": ""}, port=1)
    assert only["CUDA_VISIBLE_DEVICES"] == ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ranks_on_ray_are_started_again_and_the_error_that_began_it_is_shown(
    cluster: Any,
    resolved: Callable[..., Run],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two CPU ranks on one machine; several nodes are covered by the environments above."""
    monkeypatch.setattr(ray_ranks, "MODULE", "tests.unit.launch.small_rank")
    run = resolved("launch.backend=ray", "launch.max_restarts=1")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    assert run_on_ray(replace(run, argv=("again", str(folder))), environment) == 0

    starts = {path.name: path.read_text() for path in folder.glob("start.*")}
    assert starts == {f"start.{r}.{n}": f"2 {r} 2 " for r in (0, 1) for n in (0, 1)}
    assert "restart 1 of 1, from the last checkpoint" in caplog.text

    once = replace(run, argv=("follow", str(folder)))
    once.launch.max_restarts = 0
    assert run_on_ray(once, environment) != 0
    *_, error, who, where = capfd.readouterr().err.strip().splitlines()
    assert error == "ValueError: rank one is wrong" and who == "rank 1 failed first"
    assert "rank one is wrong" in Path(where.removeprefix("all that it printed: ")).read_text()
    assert cluster.is_initialized()  # it was there before, and stays


def test_a_missing_package_is_named_with_its_remedy(
    resolved: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"needs the Python package ray.*megasft\[ray\]"):
        run_on_ray(resolved("launch.backend=ray"), {})
