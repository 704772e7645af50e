from functools import partial
from pathlib import Path

import pytest
import torch

from megasft.batch.dataset import RowShape, RowsOfSets, RowsOfStore, WholeSet
from megasft.errors import FlagError
from megasft.loss.loss_func import sft_loss
from megasft.loss.objectives import OBJECTIVES
from megasft.packing.plan import plan_rows
from megasft.proof.samples import weighted
from megasft.schema import SFTBatch
from megasft.training.validation import loss_of_each_set, named_stores, reported_names
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
    sets = [RowsOfStore(s, p.rows, len(p)) for s, p in zip(stores, plans, strict=True)]
    names = {"one": 1.0, "many": 0.5, "few": 3.0}
    loss = partial(sft_loss, objective=objective)

    seen, sums = [], {name: torch.zeros(2) for name in ("", *names)}
    for cp_rank in range(cp_size):
        shape = RowShape(64, 4, pad_token=0, cp_rank=cp_rank, cp_size=cp_size)
        rows = RowsOfSets(sets, order, length=10 * period, shape=shape)
        for start in range(3, 3 + period, 3):  # a pass may start anywhere
            (fields,) = rows.__getitems__([start, start + 1, start + 2])
            set_of_row = fields.pop("set_of_row")
            seen += set_of_row.tolist()
            batch = SFTBatch(**fields)
            losses = torch.where(batch.turn_tokens > 0, batch.labels / 7, torch.nan)
            each = loss_of_each_set(loss, batch, set_of_row=set_of_row, sets=names)
            output = each(losses)
            whole = loss(losses, batch=batch)
            assert torch.equal(output.loss_sum, whole.loss_sum)
            for name in sums:
                sums[name] += output.reported[f"lm loss {name}".strip()]

    by_set = [seen.count(number) for number in range(3)]
    assert by_set == [cp_size * n for n in num_rows]
    for name, samples in zip(names, made, strict=True):
        alone = torch.zeros(2)
        for one in samples:
            turns = [
                [float_of(bits) * one.tokens[t] / 7 for t in range(s, s + n)]
                for s, n, _, _, bits in one.turns.tolist()
            ]
            labels = [x for turn in turns for x in turn]
            units = {"turn": turns, "sample": [labels], "token": [[x] for x in labels]}
            means = [sum(unit) / len(unit) for unit in units[objective]]
            alone += torch.tensor([sum(means), len(means)])
        scaled = [names[name] * float(alone[0]), float(alone[1])]
        assert sums[name].tolist() == pytest.approx(scaled, rel=1e-5)
        sums[name][0] /= names[name]
    together = sum((sums[name] for name in names), torch.zeros(2))
    assert sums[""].tolist() == pytest.approx(together.tolist(), rel=1e-6)
