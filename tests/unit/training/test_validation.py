from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megasft.batch.dataset import PackedRows, RowShape, WholeSet
from megasft.errors import FlagError
from megasft.loss.breakdown import Breakdown
from megasft.loss.objectives import OBJECTIVES
from megasft.packing.plan import plan_rows
from megasft.proof.samples import weighted
from megasft.report.record import losses_of
from megasft.schema import Sample, SFTBatch
from megasft.training.validation import named_stores, reported_names
from tests.stores import random_samples, sample, write_store
from tests.unit.batch.row_oracle import float_of


def test_stores_are_called_what_they_are_given_or_their_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=1").mkdir()

    named = named_stores(["data/maths/", "talk=data/chat", "seed=1", "data/seed=2", "a=b=c"])

    assert named == {
        "maths": "data/maths/",
        "talk": "data/chat",
        "seed=1": "seed=1",
        "seed=2": "data/seed=2",
        "a": "b=c",
    }
    assert named_stores(None) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a/valid", "b/valid"], "a/valid and b/valid are both called valid.* other=b/valid"),
        (["=store"], "=store is neither STORE nor NAME=STORE"),
        (["name="], "name= is neither STORE nor NAME=STORE"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(values: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        named_stores(values)


def test_a_single_store_is_reported_apart_only_if_it_has_a_name() -> None:
    assert reported_names(None) == reported_names(["data/maths"]) == ()
    assert reported_names(["maths=data/maths"]) == ("maths",)
    assert reported_names(["data/maths", "chat"]) == ("maths", "chat")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cp_size", [1, 2])
def test_each_set_has_the_loss_it_has_alone_and_all_rows_are_seen_once(
    tmp_path: Path, objective: str, cp_size: int
) -> None:
    """Sets of 1 row and of several, in micro-batches of 3 rows that mix them, losses nan in gaps.

    A label's loss is made of its token, so it is the same wherever its row lies. Turns have
    weights, normalized by a factor of each set.
    """
    made = [[sample([5, 6, 7], (1, 2))], random_samples(40, seed=3), random_samples(9, seed=4)]
    made[1:] = [weighted(samples, seed=5) for samples in made[1:]]
    stores = [write_store(tmp_path / str(n), samples) for n, samples in enumerate(made)]
    plans = [plan_rows(store, row_tokens=64, align_tokens=4, seed=0) for store in stores]
    num_rows = [len(plan) for plan in plans]
    assert num_rows[0] == 1
    assert sum(num_rows) % 3, "the last micro-batch is filled up"
    period = -(-sum(num_rows) // 3) * 3
    order = WholeSet(num_rows=sum(num_rows), period=period)
    sets = [(store, plan.rows) for store, plan in zip(stores, plans, strict=True)]
    table = Breakdown([{}, {}, {}], objective=objective, has_weights=True)

    rows_of_set: dict[int, list[int]] = {-1: [], 0: [], 1: [], 2: []}
    for cp_rank in range(cp_size):
        shape = RowShape(64, 4, pad_token=0, cp_rank=cp_rank, cp_size=cp_size)
        rows = PackedRows(sets, order, length=10 * period, shape=shape)
        for start in range(3, 3 + period, 3):  # a pass may start anywhere
            (fields,) = rows.__getitems__([start, start + 1, start + 2])
            batch = SFTBatch(**fields)
            for number, row in zip(batch.set_ids.tolist(), batch.row_ids.tolist(), strict=True):
                rows_of_set[number].append(row)
            table.add(torch.where(batch.turn_tokens > 0, batch.labels / 7, torch.nan), batch)

    first = [0, num_rows[0], num_rows[0] + num_rows[1], sum(num_rows)]
    for number in range(3):
        all_rows = sorted([*range(first[number], first[number + 1])] * cp_size)
        assert sorted(rows_of_set[number]) == all_rows
    assert rows_of_set[-1] == [-1] * cp_size * (period - sum(num_rows)), "rows of padding"
    for number, scale in enumerate((1.0, 0.5, 3.0)):
        found = losses_of(
            table.sums[number].tolist(),
            table.names[number],
            objective=objective,
            dft_alpha=0.0,
            weight_scale=scale,
        )
        assert found is not None
        total, units = by_hand(made[number], objective)
        assert found.loss == pytest.approx(scale * total / units, rel=1e-5)
        assert found.divisor == pytest.approx(units / scale)


def by_hand(samples: Sequence[Sample], objective: str) -> tuple[float, int]:
    """Return the weighted losses of all units, and how many these are."""
    means: list[float] = []
    for one in samples:
        turns = [
            [float_of(bits) * one.tokens[t] / 7 for t in range(start, start + size)]
            for start, size, _, _, bits in one.turns.tolist()
        ]
        labels = [loss for turn in turns for loss in turn]
        units = {"turn": turns, "sample": [labels], "token": [[loss] for loss in labels]}
        means += [sum(unit) / len(unit) for unit in units[objective]]
    return sum(means), len(means)
