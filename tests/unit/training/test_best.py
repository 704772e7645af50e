import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import best
from megasft.training.best import BestTracker


def flags(folder: Path, **changes: Any) -> SimpleNamespace:
    given = {
        "megasft_best": "all",
        "megasft_early_stop": None,
        "save": str(folder),
        "save_interval": 100,
        "exit_interval": None,
        "iteration": 0,
    }
    return SimpleNamespace(**(given | changes))


def decisions(tracker: BestTracker, losses: dict[int, float]) -> dict[int, tuple[bool, bool]]:
    """Say of each evaluation whether Megatron would save, and end, behind it."""
    made = {}
    for iteration, loss in losses.items():
        tracker.begin_step()
        tracker.evaluated(iteration, {"all": loss})
        args = tracker.args
        saves = iteration % args.save_interval == 0
        made[iteration] = (saves, bool(args.exit_interval) and iteration % args.exit_interval == 0)
        if made[iteration][1]:
            break
    return made


def test_the_lowest_losses_are_saved_and_named(tmp_path: Path) -> None:
    tracker = BestTracker(flags(tmp_path), writes=True)
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0, 50: 1.5}
    assert [saves for saves, _ in decisions(tracker, losses).values()] == [1, 1, 0, 0, 1]
    assert tracker.kept == {50}
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "iteration": 50,
        "set": "all",
        "loss": 1.5,
        "evaluations_since": 0,
        "evaluations": [[10, 3.0], [20, 2.0], [30, 2.5], [40, 2.0], [50, 1.5]],
    }
    tracker.begin_step()
    assert tracker.args.save_interval == 100


def test_a_run_ends_when_it_gets_no_better_for_long_enough(tmp_path: Path) -> None:
    tracker = BestTracker(flags(tmp_path, megasft_early_stop=2), writes=True)
    losses = {10: 3.0, 20: 3.5, 30: 2.9, 40: 3.0, 50: float("nan"), 60: 1.0}
    made = decisions(tracker, losses)
    assert list(made) == [10, 20, 30, 40, 50]
    assert made[50] == (False, True)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0, 20: 2.1})
    changes = {"megasft_early_stop": 2, "iteration": 20}
    resumed = BestTracker(flags(tmp_path, **changes), writes=False)
    assert resumed.kept == {10}, "before it evaluates, too: retention looks at the first step"
    assert decisions(resumed, {30: 2.05, 40: 1.0}) == {30: (False, True)}


def test_an_evaluation_of_a_step_that_was_evaluated_changes_nothing(tmp_path: Path) -> None:
    """As the last one of a finished run that is begun again, whatever it finds."""
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0, 20: 2.1})
    before = (tmp_path / "best.json").read_bytes()
    again = BestTracker(flags(tmp_path, megasft_early_stop=2, iteration=20), writes=True)
    assert decisions(again, {20: 1.0, 10: 0.5}) == {20: (False, False), 10: (False, False)}
    assert (tmp_path / "best.json").read_bytes() == before
    assert again.kept == {10}


def test_a_run_that_goes_back_knows_the_best_until_there(tmp_path: Path) -> None:
    """Killed after evaluating step 30, before it was saved; step 20 is the last checkpoint."""
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0, 20: 2.1, 30: 1.5})
    resumed = BestTracker(flags(tmp_path, megasft_early_stop=2, iteration=20), writes=True)
    assert resumed.kept == {10}
    assert decisions(resumed, {30: 1.9}) == {30: (True, False)}, "1.5 is forgotten"


@pytest.mark.parametrize("again", [5, 10])
def test_a_run_begun_again_before_its_best_forgets_it(tmp_path: Path, again: int) -> None:
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0})
    anew = BestTracker(flags(tmp_path), writes=True)
    assert decisions(anew, {again: 2.5}) == {again: (True, False)}


def test_another_set_has_a_best_of_its_own(tmp_path: Path) -> None:
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0})
    other = BestTracker(flags(tmp_path, megasft_best="math", iteration=10), writes=True)
    other.evaluated(20, {"all": 1.0, "math": 7.0})
    assert other.kept == {20}


def test_a_loss_that_is_no_number_is_never_the_best_also_when_read_again(tmp_path: Path) -> None:
    decisions(BestTracker(flags(tmp_path), writes=True), {10: float("nan"), 20: 2.0})
    resumed = BestTracker(flags(tmp_path, iteration=20), writes=True)
    assert resumed.kept == {20}
    assert decisions(resumed, {30: float("nan")}) == {30: (False, False)}


@pytest.mark.parametrize(
    ("patience", "iteration", "is_lost"),
    [
        (2, 30, True),
        (3, 30, False),
        (1, 20, True),
        (2, 20, False),
        (2, 40, False),
        (None, 30, False),
    ],
)
def test_an_early_stop_has_ended_a_run_at_its_last_evaluation(
    tmp_path: Path, patience: int | None, iteration: int, is_lost: bool
) -> None:
    """More patience, or a checkpoint of another step, and the run goes on."""
    decisions(BestTracker(flags(tmp_path), writes=True), {10: 2.0, 20: 2.1, 30: 2.2})
    args = flags(tmp_path, megasft_early_stop=patience)
    assert best.has_lost_patience(args, iteration=iteration) is is_lost


def test_a_best_that_an_older_version_wrote_is_kept(tmp_path: Path) -> None:
    old = {"iteration": 10, "set": "all", "loss": 2.0, "evaluations_since": 1}
    (tmp_path / "best.json").write_text(json.dumps(old))
    stopped = flags(tmp_path, megasft_early_stop=2, iteration=20)
    tracker = BestTracker(stopped, writes=True)
    assert tracker.kept == {10}
    assert decisions(tracker, {30: 2.5}) == {30: (False, True)}, "the second that was not better"


def test_a_run_that_saves_on_no_interval_still_saves_its_best(tmp_path: Path) -> None:
    tracker = BestTracker(flags(tmp_path, save_interval=None), writes=True)
    tracker.evaluated(7, {"all": 1.0})
    assert tracker.args.save_interval == 7
    tracker.begin_step()
    assert tracker.args.save_interval is None


def test_all_stores_together_are_averaged_by_what_the_loss_is_the_mean_of() -> None:
    few, many = SimpleNamespace(loss=1.0, divisor=1.0), SimpleNamespace(loss=2.0, divisor=3.0)
    sets: Any = {"few": few, "many": many, "none": None}
    each = best.loss_of_each(sets)
    assert (each["few"], each["many"], each["all"]) == (1.0, 2.0, 1.75)
    assert math.isnan(each["none"])
    assert math.isnan(best.loss_of_each({"none": None})["all"])


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"megasft_early_stop": 0}, ["a"], "the least is 1"),
        ({"megasft_best": None, "megasft_early_stop": 2}, ["a"], "no effect without --megasft-be"),
        ({"save": None}, ["a"], "no effect without --save"),
        ({}, [], "add --megasft-valid-data"),
        ({"megasft_best": "maths"}, ["math", "chat"], r"maths is no .*; there are math, chat"),
    ],
)
def test_what_has_no_effect_is_refused(
    changes: dict[str, Any], names: list[str], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        best.check(flags(Path("x"), **changes), names)
    best.check(flags(Path("x"), megasft_best=None), [])


def test_the_best_before_stays_known_while_a_new_one_is_being_saved(tmp_path: Path) -> None:
    tracker = BestTracker(flags(tmp_path), writes=True)
    decisions(tracker, {10: 2.0, 20: 2.1, 30: 1.5})
    found = {until: tracker.kept_until(until) for until in (5, 10, 29, 30)}
    assert found == {5: set(), 10: {10}, 29: {10}, 30: {30}}
