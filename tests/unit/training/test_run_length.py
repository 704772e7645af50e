import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import run_length


def flags(**changes: Any) -> SimpleNamespace:
    given = {
        "megasft_epochs": None,
        "megasft_save_epochs": None,
        "megasft_eval_epochs": None,
        "global_batch_size": 8,
        "train_iters": None,
        "train_samples": None,
        "save_interval": None,
        "eval_interval": 1000,
        "step_batch_size_schedule": None,
    }
    return SimpleNamespace(**(given | changes))


def plan(rows: float) -> Any:
    return SimpleNamespace(epoch_rows=rows)


@pytest.mark.parametrize(
    ("rows", "epochs", "iterations"),
    [
        (16, 2, 4),  # 32 rows in batches of 8
        (17, 1, 3),  # 17 rows: the third batch takes 7 of the next epoch
        (17, 0.5, 2),
        (16, 0.01, 1),
        (30, 0.8, 3),  # exactly 24 rows, whatever floating point makes of it
        (16.5, 2, 5),  # two packings of 16 and 17 rows
    ],
)
def test_epochs_become_iterations_that_train_every_row(
    rows: float, epochs: float, iterations: int, caplog: pytest.LogCaptureFixture
) -> None:
    args = flags(megasft_epochs=epochs)
    with caplog.at_level(logging.INFO, "megasft"):
        run_length.apply(args, plan(rows))
    assert args.train_iters == iterations
    assert 0 <= iterations * 8 - rows * epochs < 8
    assert f" are {iterations} iterations of 8 (--train-iters)" in caplog.text


def test_the_log_says_what_the_last_iteration_takes_of_the_next_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "megasft"):
        run_length.apply(flags(megasft_epochs=2), plan(412))
    assert caplog.messages == [
        "2 epochs of 412 rows are 103 iterations of 8 (--train-iters); the last takes 0 rows "
        "more, from the epoch after"
    ]


def test_a_batch_size_that_ramps_up_is_counted_in_rows() -> None:
    args = flags(megasft_epochs=1.5, step_batch_size_schedule="0:2 1K:4", global_batch_size=None)
    run_length.apply(args, plan(17))
    assert (args.train_samples, args.train_iters) == (26, None)


def test_saving_and_evaluating_go_by_fractions_of_an_epoch() -> None:
    args = flags(megasft_save_epochs=0.5, megasft_eval_epochs=0.25, train_iters=10)
    run_length.apply(args, plan(64))
    assert (args.save_interval, args.eval_interval, args.train_iters) == (4, 2, 10)


def test_nothing_is_set_without_our_flags() -> None:
    args = flags(train_iters=7)
    run_length.apply(args, plan(64))
    assert args == flags(train_iters=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megasft_epochs": 0.0}, "--megasft-epochs is 0; a length is positive"),
        ({"megasft_epochs": float("nan")}, "a length is positive"),
        ({"megasft_epochs": 1, "global_batch_size": None}, "needs --global-batch-size"),
        ({"megasft_epochs": 1, "train_iters": 5}, "--megasft-epochs and --train-iters exclude"),
        ({"megasft_epochs": 1, "train_samples": 5}, "--train-samples exclude"),
        ({"megasft_save_epochs": 1, "save_interval": 5}, "--save-interval exclude"),
        ({"megasft_eval_epochs": 1, "eval_interval": 5}, "--eval-interval exclude"),
        ({"megasft_eval_epochs": 1, "step_batch_size_schedule": "0:2"}, "schedule changes it"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        run_length.apply(flags(**changes), plan(64))
