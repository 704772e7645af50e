"""When a run is over, and what is left alone then."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.training import resume, saving
from megasft.training.retention import TRACKER


def flags(folder: Path, **changes: Any) -> SimpleNamespace:
    given = {
        "save": str(folder),
        "load": str(folder),
        "finetune": False,
        "skip_train": False,
        "ckpt_step": None,
        "train_iters": 6,
        "train_samples": None,
        "megasft_best": None,
        "megasft_early_stop": None,
        "megasft_keep_last": None,
        "save_interval": 4,
        "rank": 0,
        "iteration": 6,
        "megasft_log_dir": None,
    }
    return SimpleNamespace(**(given | changes))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of six steps that is complete."""
    for step in (4, 6):
        (tmp_path / f"iter_{step:07d}").mkdir()
    (tmp_path / TRACKER).write_text("6")
    (tmp_path / saving.COMPLETE).write_text(json.dumps({"iteration": 6}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "is_over"),
    [
        ({}, True),
        ({"train_iters": 5}, True),
        ({"train_iters": 7}, False),
        ({"train_iters": None}, False),
        ({"load": None}, False),
        ({"load": "elsewhere"}, False),
        ({"save": None}, False),
        ({"finetune": True}, False),
        ({"skip_train": True}, False),
        ({"ckpt_step": 4, "train_iters": 4}, False),
        ({"train_iters": None, "train_samples": 48}, True),
        ({"train_iters": None, "train_samples": 49}, False),
    ],
)
def test_a_complete_run_is_over_unless_its_flags_ask_for_more(
    finished: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_over: bool
) -> None:
    state = {"args": SimpleNamespace(consumed_train_samples=48)}
    monkeypatch.setattr(resume, "read_state", lambda _: state)
    assert saving.is_over(flags(finished, **changes)) is is_over


def test_a_run_without_the_mark_is_not_over_its_evaluation_may_be_missing(finished: Path) -> None:
    (finished / saving.COMPLETE).unlink()
    assert not saving.is_over(flags(finished))
    (finished / saving.COMPLETE).write_text(json.dumps({"iteration": 4}))
    assert not saving.is_over(flags(finished)), "the mark is of a shorter run"
    (finished / saving.COMPLETE).write_text("")
    assert not saving.is_over(flags(finished))


def test_a_run_that_its_early_stop_ended_is_over_and_gets_its_mark(finished: Path) -> None:
    made = {"iteration": 2, "set": "all", "loss": 1.0, "evaluations_since": 2}
    made["evaluations"] = [[2, 1.0], [4, 1.5], [6, 1.25]]
    (finished / "best.json").write_text(json.dumps(made))
    (finished / saving.COMPLETE).unlink()
    stopped = {"megasft_best": "all", "megasft_early_stop": 2, "train_iters": 100}
    assert saving.is_over(flags(finished, **stopped))
    assert not saving.is_over(flags(finished, **stopped | {"megasft_early_stop": 3}))
    saving.end_again(flags(finished, **stopped, rank=1))
    assert not (finished / saving.COMPLETE).exists(), "rank 0 writes"
    saving.end_again(flags(finished, **stopped))
    assert json.loads((finished / saving.COMPLETE).read_text()) == {"iteration": 6}


def test_a_mark_that_is_right_is_not_written_again(finished: Path) -> None:
    before = (finished / saving.COMPLETE).stat()
    saving.end_again(flags(finished))
    after = (finished / saving.COMPLETE).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_run_that_only_evaluates_leaves_the_mark_and_the_checkpoints(finished: Path) -> None:
    """Also of a run that is half done: it must not look complete then."""
    (finished / saving.COMPLETE).unlink()
    keep_one = {"megasft_keep_last": 1, "skip_train": True}
    with saving.Keeper(flags(finished, **keep_one), rank=0) as keeper:
        keeper.evaluated(6, {"all": 1.0})
    assert not (finished / saving.COMPLETE).exists()
    assert sorted(p.name for p in finished.glob("iter_*")) == ["iter_0000004", "iter_0000006"]


def test_a_run_that_ends_before_its_first_step_deletes_nothing(finished: Path) -> None:
    """What is the best is known only once a checkpoint is loaded."""
    args = flags(finished, megasft_keep_last=1)
    with pytest.raises(ValueError, match="cannot load"), saving.Keeper(args, rank=0):
        raise ValueError("cannot load")
    assert (finished / "iter_0000004").is_dir()
    with saving.Keeper(args, rank=0) as keeper:
        keeper.end_step()
    assert not (finished / "iter_0000004").exists()


def test_the_last_checkpoint_is_not_written_a_second_time_at_the_end(finished: Path) -> None:
    """Megatron does unless the interval of its settings divides the last step."""
    settings = SimpleNamespace(save_interval=4)
    saving.Keeper(flags(finished), rank=0).settle_intervals(settings)
    assert 6 % settings.save_interval == 0, "no step is left"

    settings = SimpleNamespace(save_interval=100)
    args = flags(finished, train_iters=9, megasft_best="all", save_interval=100)
    keeper = saving.Keeper(args, rank=0)
    keeper.settle_intervals(settings)
    keeper.end_step()
    keeper.evaluated(9, {"all": 1.0})
    assert args.save_interval == settings.save_interval == 9
    keeper.end_step()
    assert args.save_interval == settings.save_interval == 100


@pytest.mark.parametrize(("changes", "held"), [({}, [".", "log"]), ({"skip_train": True}, ["log"])])
def test_rank_0_holds_the_folders_that_its_run_writes_to(
    tmp_path: Path, changes: dict[str, Any], held: list[str]
) -> None:
    found = {}
    for rank in (1, 0):
        with saving.only_writer(flags(tmp_path, **changes, rank=rank)):
            named = [p for p in tmp_path.rglob(".writer.json") if p.read_text()]
            found[rank] = sorted(str(p.parent.relative_to(tmp_path)) for p in named)
    assert found == {1: [], 0: held}
