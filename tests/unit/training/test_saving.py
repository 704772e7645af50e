"""When a run is over, and what is left alone then."""

import json
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import saving
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
        "eval_iters": 0,
        "global_batch_size": 8,
        "step_batch_size_schedule": None,
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
        ({"train_iters": None, "train_samples": 55}, True),  # six steps of 8, as Megatron rounds
        ({"train_iters": None, "train_samples": 56}, False),
        ({"train_iters": None, "train_samples": 48, "step_batch_size_schedule": "0:8"}, True),
        ({"train_iters": None, "train_samples": 49, "step_batch_size_schedule": "0:8"}, False),
    ],
)
def test_a_complete_run_is_over_unless_its_flags_ask_for_more(
    finished: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_over: bool
) -> None:
    state = {"args": SimpleNamespace(consumed_train_samples=48)}
    monkeypatch.setattr(saving, "read_state", lambda _: state)
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


def test_a_run_that_would_end_at_once_with_most_of_its_rows_untrained_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 6 of 10 with batches of 8; now two epochs are 5 steps of 16."""
    state = {"args": SimpleNamespace(consumed_train_samples=48, global_batch_size=8)}
    monkeypatch.setattr(saving, "read_state", lambda _: state)
    with pytest.raises(FlagError, match=r"48 rows in 6 steps of 8, .* 5 steps of 16 long, .* 80 r"):
        saving.check_steps_left(flags(finished, train_iters=5, global_batch_size=16))
    for fine in ({"train_iters": 6}, {"train_iters": 3, "global_batch_size": 16}):
        saving.check_steps_left(flags(finished, **fine))
    saving.check_steps_left(flags(finished, train_iters=7, global_batch_size=16))


@pytest.mark.parametrize(
    ("error", "evaluated", "is_marked"),
    [
        (None, 6, True),
        (None, 4, False),
        (SystemExit(0), 6, False),
        (ValueError("disk full"), 6, False),
    ],
)
def test_a_run_is_marked_complete_when_it_trained_saved_and_evaluated_all(
    finished: Path, error: BaseException | None, evaluated: int, is_marked: bool
) -> None:
    """A time limit may end it in its last evaluation, and a signal before that."""
    keeper = saving.Keeper(flags(finished, eval_iters=2), rank=0)
    with suppress(SystemExit, ValueError), keeper:
        keeper.evaluated(evaluated, {"all": 1.0})
        if error is not None:
            raise error
    assert (finished / saving.COMPLETE).exists() is is_marked


@pytest.mark.parametrize(("error", "is_marked"), [(SystemExit(0), True), (OSError(28), False)])
def test_an_early_stop_marks_a_run_complete_unless_its_save_failed(
    finished: Path, error: BaseException, is_marked: bool
) -> None:
    args = flags(finished, megasft_best="all", megasft_early_stop=1, iteration=2)
    keeper = saving.Keeper(args, rank=0)
    with suppress(SystemExit, OSError), keeper:
        for step, loss in ((4, 1.0), (6, 2.0)):
            keeper.end_step()
            keeper.evaluated(step, {"all": loss})
        raise error
    assert (finished / saving.COMPLETE).exists() is is_marked


def test_another_run_in_the_folder_deletes_none_of_what_it_finds(finished: Path) -> None:
    """The command of a finished run without its --load; the tracker says 2 by then."""
    args = flags(finished, load=None, megasft_keep_last=1, iteration=0)
    with saving.Keeper(args, rank=0) as keeper:
        for step in (1, 2, 8):
            (finished / f"iter_{step:07d}").mkdir()
            (finished / TRACKER).write_text(str(step))
            keeper.end_step()
    assert sorted(int(p.name[5:]) for p in finished.glob("iter_*")) == [4, 6, 8]


def test_the_best_stays_while_a_better_one_is_being_saved(finished: Path) -> None:
    """The tracker says 6, written by an earlier save, when the one of step 8 is under way."""
    (finished / TRACKER).write_text("4")
    args = flags(finished, megasft_best="all", megasft_keep_last=1, iteration=0)
    with suppress(OSError), saving.Keeper(args, rank=0) as keeper:
        for step, loss in ((4, 2.0), (8, 1.0)):
            keeper.end_step()
            keeper.evaluated(step, {"all": loss})
        (finished / TRACKER).write_text("6")
        keeper.end_step()
        raise OSError("killed before step 8 was whole")
    assert (finished / "iter_0000004").is_dir()


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
    saving.Keeper(flags(finished), rank=0).spare_last_save(settings)
    assert 6 % settings.save_interval == 0, "no step is left"

    settings = SimpleNamespace(save_interval=100)
    args = flags(finished, train_iters=9, megasft_best="all", save_interval=100)
    keeper = saving.Keeper(args, rank=0)
    keeper.spare_last_save(settings)
    keeper.end_step()
    keeper.evaluated(9, {"all": 1.0})
    assert args.save_interval == settings.save_interval == 9
    keeper.end_step()
    assert args.save_interval == settings.save_interval == 100


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_run_that_is_to_save_beside_training_does(tmp_path: Path, is_asked_for: bool) -> None:
    """Megatron's validation drops the flag, with a warning, unless its worker is persistent."""
    more = {"async_save": is_asked_for, "async_strategy": "nvrx"}
    args = flags(tmp_path, **more, use_persistent_ckpt_worker=False)
    saving.apply(args)
    assert args.exit_signal_handler and args.use_persistent_ckpt_worker is is_asked_for
    assert args.async_strategy == ("mcore" if is_asked_for else "nvrx")


@pytest.mark.parametrize(("changes", "held"), [({}, [".", "log"]), ({"skip_train": True}, ["log"])])
def test_rank_0_holds_the_folders_that_its_run_writes_to(
    tmp_path: Path, changes: dict[str, Any], held: list[str]
) -> None:
    found = {}
    log = str(tmp_path / "x" / ".." / "log")  # the default folder by another name
    (tmp_path / "x").mkdir()
    with saving.only_writer(flags(tmp_path, megasft_log_dir=log)):
        pass
    for rank in (1, 0):
        with saving.only_writer(flags(tmp_path, **changes, rank=rank)):
            named = [p for p in tmp_path.rglob(".writer.json") if p.read_text()]
            found[rank] = sorted(str(p.parent.relative_to(tmp_path)) for p in named)
    assert found == {1: [], 0: held}


@pytest.mark.parametrize(("is_ignored", "told"), [(False, [15, 15]), (True, [15])])
def test_a_closed_terminal_and_a_scheduler_end_a_run_as_its_exit_signal_does(
    is_ignored: bool, told: list[int]
) -> None:
    """Under nohup SIGHUP is ignored, and stays so."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        if is_ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        args = SimpleNamespace(exit_signal_handler=True, exit_signal=signal.SIGTERM)
        with saving.ends_by_signal(args):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
        assert received == told
        now = [signal.getsignal(number) for number in numbers[1:]]
        assert now == [signal.SIG_IGN if is_ignored else before[1], before[2]]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
