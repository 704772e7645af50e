from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.packing.balance import BatchShape, DealtOrder, slowest_over_mean
from megasft.packing.cost_window import CostWindow, WindowedOrder
from megasft.packing.order import RowOrder

unhurried = settings(deadline=None)


def windowed(
    stages: list[int], *, batches: int, rows: int, seed: int = 3
) -> tuple[RowOrder, WindowedOrder]:
    order = RowOrder(num_rows=stages[-1], seed=seed, stages=stages)
    costs = np.random.default_rng(0).integers(1, 1000, stages[-1])
    return order, WindowedOrder(order, costs, CostWindow(batches, rows))


stage_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(sum)


@unhurried
@given(stage_sizes, st.integers(2, 5), st.integers(1, 9), st.integers(0, 99))
def test_each_epoch_and_stage_still_trains_its_own_rows_once(
    sizes: list[int], batches: int, rows: int, seed: int
) -> None:
    stages = np.cumsum([0, *sizes]).tolist()
    _, order = windowed(stages, batches=batches, rows=rows, seed=seed)
    for epoch in range(3):
        for start, end in pairwise(stages):
            first = epoch * stages[-1]
            trained = [order[first + k] for k in range(start, end)]
            assert sorted(trained) == list(range(start, end))


@unhurried
@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 9))
def test_rows_stay_in_their_window(num_rows: int, batches: int, rows: int) -> None:
    plain, order = windowed([0, num_rows], batches=batches, rows=rows)
    size = batches * rows
    for first in range(0, 3 * size, size):
        window = range(first, first + size)
        assert sorted(plain[k] for k in window) == sorted(order[k] for k in window)


def test_a_position_means_the_same_row_from_wherever_one_starts() -> None:
    run = [windowed([0, 5, 23], batches=2, rows=4)[1][k] for k in range(100)]
    for start in (1, 8, 22, 23, 57):
        fresh = windowed([0, 5, 23], batches=2, rows=4)[1]
        assert [fresh[k] for k in range(start, 100)] == run[start:]
    back_and_forth = windowed([0, 5, 23], batches=2, rows=4)[1]
    places = (99, 0, 24, 22, 3, 98)
    assert [back_and_forth[k] for k in places] == [run[k] for k in places]


def test_batches_cost_alike_within_and_come_in_a_random_order() -> None:
    """24 rows, windows of 3 batches of 4: sorted costs 0..11 and 12..23 of each window's rows."""
    order = RowOrder(num_rows=24, seed=1)
    costs = np.arange(24)
    sorted_ = WindowedOrder(order, costs, CostWindow(num_batches=3, batch_rows=4))
    batches = [[sorted_[k] for k in range(b, b + 4)] for b in range(0, 24, 4)]

    first_window = sorted(order[k] for k in range(12))
    cut = [first_window[i : i + 4] for i in (0, 4, 8)]
    assert sorted(batches[:3]) == sorted(cut)
    means = [[np.mean(b) for b in batches[i : i + 3]] for i in (0, 3)]
    dear_first = [m != sorted(m) for m in means]
    assert any(dear_first), "always from cheap to dear would be a curriculum nobody asked for"


def test_global_batches_keep_their_edges_across_the_end_of_an_epoch() -> None:
    """10 rows, batches of 4: batch 2 takes the last 2 rows of epoch 0 and 2 of epoch 1."""
    _, order = windowed([0, 10], batches=2, rows=4)
    assert sorted(order[k] for k in range(8, 10)) == sorted(set(range(10)) - {*_rows(order, 8)})
    assert sorted(order[k] for k in range(10, 20)) == list(range(10))


def _rows(order: WindowedOrder, end: int) -> list[int]:
    return [order[k] for k in range(end)]


def test_a_window_evens_out_what_dealing_cannot() -> None:
    """One row in sixteen costs ten times the others: 2 ranks, 4 rows a batch, dealt."""
    rng = np.random.default_rng(5)
    costs = np.where(rng.random(512) < 1 / 16, 10.0, 1.0) + rng.random(512) / 10
    order, shape = RowOrder(num_rows=512, seed=2), BatchShape(4, 2, 1)
    slowest = []
    for rows in (order, WindowedOrder(order, costs, CostWindow(32, 4))):
        dealt = DealtOrder(rows, costs, shape)
        steps = [costs[[dealt[k] for k in range(b, b + 4)]] for b in range(0, 512, 4)]
        slowest.append(
            np.mean([slowest_over_mean(s, dp_size=2, micro_batch_size=1) for s in steps])
        )
    assert slowest[0] > 1.1
    assert slowest[1] < 1.03


@pytest.mark.parametrize(("size", "other"), [(8, 4), (4, 8)])
def test_another_batch_size_is_another_order(size: int, other: int) -> None:
    """Why a run with a window does not resume with another global batch size."""
    one, two = (windowed([0, 32], batches=2, rows=rows)[1] for rows in (size, other))
    assert _rows(one, 32) != _rows(two, 32)
    assert one.window.identity != two.window.identity
