import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.errors import FlagError
from megasft.training import datasets
from tests.stores import random_samples, sample, write_store


def flags(store: Path, **changes: Any) -> SimpleNamespace:
    good = {
        "megasft_data": [str(store)],
        "megasft_mixture": None,
        "megasft_valid_data": [str(store)],
        "megasft_align_tokens": 8,
        "megasft_packer": "balanced",
        "megasft_packings": 1,
        "megasft_cost_window": 0,
        "megasft_no_balance": True,
        "megasft_plan_cache": None,
        "megasft_turn_weights": "use",
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "seq_length": 64,
        "seed": 0,
        "vocab_size": None,
        "padded_vocab_size": None,
        "global_batch_size": 4,
        "eval_global_batch_size": 4,
        "skip_train": False,
        "train_iters": None,
        "train_samples": None,
    }
    return SimpleNamespace(**(good | changes))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_rows_do_not_depend_on_the_layout(tmp_path: Path, cp_size: int) -> None:
    write_store(tmp_path / "store", random_samples(60, seed=1))

    alone = datasets.open_data(flags(tmp_path / "store"))
    layout = {"context_parallel_size": cp_size, "tensor_model_parallel_size": 2}
    spread = datasets.open_data(flags(tmp_path / "store", **layout))

    assert spread.train.plan.identity == alone.train.plan.identity
    assert spread.train.plan.rows.samples.tolist() == alone.train.plan.rows.samples.tolist()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"seq_length": 60}, "set it to 64"),
        ({"seq_length": 72, "context_parallel_size": 8}, "TP 1 x CP 8 .* set it to 80"),
        ({"tensor_model_parallel_size": 16, "sequence_parallel": True, "seq_length": 72}, "to 80"),
    ],
)
def test_a_row_length_that_cannot_be_cut_is_refused_with_the_next_that_can(
    tmp_path: Path, changes: dict[str, Any], remedy: str
) -> None:
    write_store(tmp_path / "store", random_samples(10, seed=1))

    with pytest.raises(FlagError, match=remedy):
        datasets.open_data(flags(tmp_path / "store", **changes))


def test_what_an_epoch_holds_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(tmp_path / "store", [sample([1] * n, (1, n - 1)) for n in (32, 32, 64, 80, 90)])
    args = flags(tmp_path / "store", megasft_valid_data=None)
    data = datasets.open_data(args)

    with caplog.at_level(logging.INFO, "megasft"):
        datasets.announce(args, data)

    epoch, balance, left_out = caplog.messages
    assert "2 rows of 64 tokens (0.00 % padding), 3 samples, 3 turns, 128 tokens" in epoch
    assert balance.endswith("rows are trained where they come, since --megasft-no-balance is given")
    assert "125 of them labels; an epoch is 0.50 iterations of 4 rows" in epoch
    assert "2 of 5 samples are longer than --seq-length 64 and are left out (170 tokens" in left_out
    assert left_out.endswith("first: made.jsonl:4)")


def test_a_run_without_a_length_is_refused_with_the_length_of_an_epoch(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [sample([1] * 64, (1, 5))] * 9)
    args = flags(tmp_path / "store")
    data = datasets.open_data(args)

    with pytest.raises(FlagError, match="an epoch of 9 rows is 3 iterations of 4 rows"):
        datasets.check_length(args, data)
    datasets.check_length(flags(tmp_path / "store", train_iters=1), data)


def test_evaluation_covers_the_whole_store_whatever_its_size(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [sample([1] * 64, (1, 5))] * 9)
    args = flags(tmp_path / "store")
    data = datasets.open_data(args)

    datasets.set_eval_iters(args, data)
    assert args.eval_iters == 3  # 9 rows in batches of 4, the last one filled up
    datasets.set_eval_iters(args, data._replace(valid={}))
    assert args.eval_iters == 0


def test_several_stores_and_a_mixture_make_one_plan_and_say_what_was_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        write_store(tmp_path / name, [sample([1] * 32, (1, 31))] * 8)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "curriculum: sequential\nparts: [{source: two, sample_rate: 2}, {source: one}]"
    )
    stores = [str(tmp_path / "one"), str(tmp_path / "two")]
    args = flags(tmp_path / "one", megasft_data=stores, megasft_mixture=str(mixture))

    data = datasets.open_data(args)
    with caplog.at_level(logging.INFO, "megasft"):
        datasets.announce(args, data)

    plan = data.train.plan
    assert plan.stages == (0, 8, 12)
    assert {int(i) for r in range(8) for i in plan.rows[r]} == set(range(8, 16))
    assert {int(i) for r in range(8, 12) for i in plan.rows[r]} == set(range(8))
    assert "12 rows of 64 tokens (0.00 % padding) in 2 stages, 8 + 4," in caplog.messages[0]
    assert caplog.messages[1:5] == [
        "mixture: two: 16 samples drawn of 8",
        "mixture: one: 8 samples drawn of 8",
        "stage two: iterations 0.00 to 2.00 of each epoch",
        "stage one: iterations 2.00 to 3.00 of each epoch",
    ]
    plain = datasets.open_data(flags(tmp_path / "one", megasft_data=stores))
    assert plain.train.plan.identity != plan.identity
    assert len(plain.train.plan) == 8
    (valid,) = data.valid.values()
    assert len(valid.plan) == 4  # the mixture is for training alone
