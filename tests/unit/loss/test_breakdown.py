import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from megasft.batch.assemble import Columns, assemble
from megasft.batch.context_parallel import shard
from megasft.loss.breakdown import (
    CATEGORIES,
    COLUMNS,
    LAST_POSITION,
    LENGTH_EDGES,
    LENGTHS,
    POSITIONS,
    WHOLE,
    Breakdown,
)
from megasft.loss.objectives import OBJECTIVES
from megasft.schema import Sample, turn_records
from tests.batches import batch_of

ALIGN = 16


def conversation(*turns: tuple[int, int], gap: int = 2) -> Sample:
    """A sample of turns given as (label tokens, category), each behind ``gap`` prompt tokens."""
    records, at = [], gap
    for n, (size, category) in enumerate(turns):
        records.append((at, size, category, n))
        at += size + gap
    return Sample(np.arange(at, dtype=np.int32), turn_records(records))


def row_of(*samples: Sample, row_tokens: int) -> Columns:
    return assemble(samples, row_tokens=row_tokens, align_tokens=ALIGN, pad_token=0)


def some_losses(row: Columns, *, seed: int = 0) -> np.ndarray:
    """Losses at labels, and what padding may hold everywhere else."""
    losses = np.random.default_rng(seed).uniform(0, 9, len(row["tokens"])).astype(np.float32)
    nowhere = np.where(np.arange(len(losses)) % 2, np.nan, np.inf)
    return np.where(row["turn_tokens"] > 0, losses, nowhere).astype(np.float32)


class Label:
    """One label of a row, as a loop over it sees it."""

    def __init__(self, row: Columns, t: int, ce: float) -> None:
        self.ce, self.category = ce, int(row["category_ids"][t])
        self.of_turn, self.of_sample = int(row["turn_tokens"][t]), int(row["sample_tokens"][t])
        self.ends = (bool(row["ends_turn"][t]), bool(row["ends_sample"][t]))
        self.number = int(row["turn_numbers"][t])

    def sums(self, objective: str) -> list[float]:
        weight = {"token": 1.0, "turn": 1 / self.of_turn, "sample": 1 / self.of_sample}[objective]
        p = math.exp(-self.ce)
        plain = [1.0, *map(float, self.ends), self.ce, self.ce / self.of_turn]
        return [*plain, self.ce / self.of_sample, p, self.ce * p * weight]


def labels_of(row: Columns, losses: np.ndarray) -> list[Label]:
    places = np.flatnonzero(row["turn_tokens"])
    return [Label(row, int(t), float(np.float64(losses[t]))) for t in places]


def expected(
    labels: Sequence[Label], which: Callable[[Label], bool], *, objective: str
) -> list[float]:
    sums = [label.sums(objective) for label in labels if which(label)]
    return np.sum(sums, axis=0).tolist() if sums else [0.0] * len(COLUMNS)


def length_slot(size: int) -> int:
    return sum(size >= edge for edge in LENGTH_EDGES)


FOUR = {1: "a", 2: "b", 3: "c", 7: "d"}
MANY = (
    conversation(*[(1 + n, 1 + n % 3) for n in range(11)]),
    conversation((15, 3), (16, 7), (17, 0), (63, 3), (64, 3)),
    conversation((300, 1)),
)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_each_slot_is_the_sum_over_its_own_labels(objective: str) -> None:
    row = row_of(*MANY, row_tokens=768)
    losses = some_losses(row)
    names = {9: "rare", 1: "a", 2: "b", 3: "c", 7: "d"}
    table = Breakdown([names], objective=objective)
    table.add(torch.from_numpy(losses), batch_of(row))

    labels, (slots,) = labels_of(row, losses), table.sums
    assert {min(label.number, LAST_POSITION) for label in labels} == set(range(1, 9))
    assert len({length_slot(label.of_turn) for label in labels}) == 4

    def close(found: torch.Tensor, which: Callable[[Label], bool]) -> None:
        wanted = expected(labels, which, objective=objective)
        # The last column is weighted in float32, as the loss is.
        assert found.tolist()[:-1] == pytest.approx(wanted[:-1], rel=1e-12)
        assert found.tolist()[-1] == pytest.approx(wanted[-1], rel=1e-6)

    close(slots[WHOLE], lambda _: True)
    for n, category in enumerate((0, 1, 2, 3, 7, 9)):
        close(slots[CATEGORIES][n], lambda x, c=category: x.category == c)
    for n in range(LAST_POSITION):
        same = (lambda x, n=n: x.number == n + 1) if n + 1 < LAST_POSITION else (
            lambda x: x.number >= LAST_POSITION
        )  # fmt: skip
        close(slots[POSITIONS][n], same)
    for n in range(len(LENGTH_EDGES) + 1):
        close(slots[LENGTHS][n], lambda x, n=n: length_slot(x.of_turn) == n)
    assert table.names == [("", "a", "b", "c", "d", "rare")]
    assert slots[CATEGORIES][-1].abs().sum() == 0, "category 9 has no label"


@pytest.mark.parametrize("cp_size", [2, 4])
def test_shares_and_micro_batches_sum_to_the_whole(cp_size: int) -> None:
    row = row_of(*MANY, row_tokens=768)
    losses = some_losses(row)
    whole, parts = (Breakdown([FOUR], objective="turn") for _ in range(2))
    whole.add(torch.from_numpy(losses), batch_of(row))

    turns_cut = 0
    for rank in range(cp_size):
        share = shard(row, cp_rank=rank, cp_size=cp_size)
        here = shard({**row, "labels": np.arange(768)}, cp_rank=rank, cp_size=cp_size)["labels"]
        parts.add(torch.from_numpy(losses[here]), batch_of(share))
        turns_cut += int((share["turn_tokens"] == 300).sum() not in (0, 300))

    assert turns_cut == cp_size, "a turn must lie on several shares for this to say anything"
    assert torch.allclose(whole.sums, parts.sums, rtol=1e-12, atol=0)
    whole.add(torch.from_numpy(losses), batch_of(row))
    assert torch.allclose(whole.sums, 2 * parts.sums, rtol=1e-12, atol=0)


def test_validation_sets_are_summed_apart_each_with_its_own_categories() -> None:
    """Category 2 of one set is not category 2 of another, and padding rows are of no set."""
    rows = [
        row_of(conversation((4, 2), (5, 3)), row_tokens=64),
        row_of(row_tokens=64),
        row_of(conversation((20, 2), (3, 0)), row_tokens=64),
    ]
    losses = [some_losses(row, seed=n) for n, row in enumerate(rows)]
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    table = Breakdown([{3: "b", 2: "a"}, {}, {2: "c"}], objective="token")
    table.add(torch.from_numpy(np.concatenate(losses)), batch_of(joined, set_ids=[2, -1, 0]))

    assert table.names == [("", "a", "b"), ("",), ("", "c")]
    for number, row in ((2, 0), (0, 2)):
        alone = Breakdown([{2: "a", 3: "b"}], objective="token")
        alone.add(torch.from_numpy(losses[row]), batch_of(rows[row]))
        for group in (WHOLE, POSITIONS, LENGTHS):
            assert alone.sums[0][group].abs().sum() > 0
            assert torch.allclose(table.sums[number][group], alone.sums[0][group])
    first, empty, last = table.sums
    assert first[CATEGORIES, 0].tolist() == [3.0, 20.0, 0.0]
    assert empty.abs().sum() == 0
    # Category 3 is not one of the last set: its five labels go with those that name none.
    assert last[CATEGORIES, 0].tolist() == [5.0, 4.0, 0.0]


def test_a_batch_without_labels_adds_nothing_and_no_nan() -> None:
    row = row_of(conversation(), row_tokens=32)
    table = Breakdown([{}], objective="turn")
    table.add(torch.full((1, 32), math.nan), batch_of(row))
    assert table.sums.abs().sum() == 0
    assert table.sums.shape == (1, 1 + LAST_POSITION + len(LENGTH_EDGES) + 1 + 1, len(COLUMNS))
