import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.packing.balance import (
    BatchShape,
    Cost,
    DealtOrder,
    cost_of_model,
    deal,
    slowest_over_mean,
)
from megasft.packing.order import RowOrder

sizes = st.sampled_from([1, 2, 3, 4])


unhurried = settings(deadline=None)
"""The first example of a test may wait for a busy machine."""


def long_tail(num: int, *, seed: int) -> np.ndarray:
    """Costs of rows of which every fifth holds a document that is most of the row."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < 0.2, rng.uniform(1.5, 3, num), rng.uniform(1, 1.1, num))


@unhurried
@given(sizes, sizes, sizes, st.integers(0, 2**32))
def test_a_deal_is_a_permutation_and_the_same_on_every_rank(
    num_micro_batches: int, dp_size: int, micro_batch_size: int, seed: int
) -> None:
    costs = long_tail(num_micro_batches * dp_size * micro_batch_size, seed=seed)
    dealt = deal(costs, dp_size=dp_size, micro_batch_size=micro_batch_size)

    assert sorted(dealt.tolist()) == list(range(len(costs)))
    again = deal(costs, dp_size=dp_size, micro_batch_size=micro_batch_size)
    assert dealt.tolist() == again.tolist()


def test_ranks_end_together_where_they_did_not() -> None:
    before, after = [], []
    for seed in range(100):
        costs = long_tail(32, seed=seed)
        dealt = costs[deal(costs, dp_size=8, micro_batch_size=1)]
        before.append(slowest_over_mean(costs, dp_size=8, micro_batch_size=1))
        after.append(slowest_over_mean(dealt, dp_size=8, micro_batch_size=1))
    assert np.mean(before) > 1.3
    assert np.mean(after) < 1.15
    assert all(b <= a for a, b in zip(before, after, strict=True))


def test_a_swap_mends_what_dealing_in_rounds_leaves() -> None:
    # In rounds: 9 + 1 + 1 + 1 and 5 + 5 + 4 + 4; the best is 15 each.
    costs = np.array([9.0, 5.0, 5.0, 4.0, 4.0, 1.0, 1.0, 1.0])
    dealt = costs[deal(costs, dp_size=2, micro_batch_size=1)]
    assert dealt.reshape(4, 2).sum(axis=0).tolist() == [15, 15]


def test_each_rank_begins_with_its_dearest_micro_batch() -> None:
    costs = long_tail(24, seed=3)
    of_rank = costs[deal(costs, dp_size=4, micro_batch_size=2)].reshape(3, 4, 2).sum(axis=2)
    assert (np.diff(of_rank, axis=0) <= 0).all()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_are_the_same_on_any_number_of_ranks(micro_batch_size: int) -> None:
    """What is a mean over a micro-batch, a router's loss, must not depend on data parallelism."""
    costs = long_tail(48, seed=5)
    made = [
        {
            frozenset(rows)
            for rows in deal(costs, dp_size=dp, micro_batch_size=micro_batch_size)
            .reshape(-1, micro_batch_size)
            .tolist()
        }
        for dp in (1, 2, 3, 6, 12)
    ]
    assert all(one == made[0] for one in made)


@unhurried
@given(
    start=st.integers(0, 40),
    num_micro_batches=sizes,
    dp_size=sizes,
    micro_batch_size=sizes,
    seed=st.integers(0, 50),
)
def test_each_global_batch_trains_the_rows_it_would_train_undealt(
    start: int, num_micro_batches: int, dp_size: int, micro_batch_size: int, seed: int
) -> None:
    """Wherever a run is resumed and however it is split, across the edges of epochs."""
    size = num_micro_batches * dp_size * micro_batch_size
    order = RowOrder(num_rows=17, seed=seed)
    shape = BatchShape(size, dp_size, micro_batch_size)
    dealt = DealtOrder(order, long_tail(17, seed=1), shape, start=start)

    for first in range(start, start + 5 * size, size):
        batch = range(first, first + size)
        assert sorted(dealt[k] for k in batch) == sorted(order[k] for k in batch)


def test_a_position_means_the_same_row_in_whatever_order_workers_ask() -> None:
    order, costs, shape = RowOrder(num_rows=10, seed=1), long_tail(10, seed=2), BatchShape(4, 2, 1)
    whole = [DealtOrder(order, costs, shape)[k] for k in range(40)]
    one = DealtOrder(order, costs, shape)

    assert [one[k] for k in range(40)] == whole
    assert [one[k] for k in (39, 5, 4, 17, 0)] == [whole[k] for k in (39, 5, 4, 17, 0)]
    assert whole != [order[k] for k in range(40)]


def test_the_cost_of_a_model_is_that_of_its_products_counted_one_by_one() -> None:
    """2 layers of width 4, 2 query heads of 2 and 1 key head of 2, a gated MLP of 8, 10 tokens."""
    one_layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k, v, output, MLP
    cost = cost_of_model(
        num_layers=2,
        hidden_size=4,
        attention_size=4,
        key_value_size=2,
        mlp_weights=3 * 4 * 8,
        vocab_size=10,
    )
    assert cost == Cost(per_token=6 * (2 * one_layer + 4 * 10), per_square=2 * 7 * 4)
    assert cost.of(10, np.array([58, 100])).tolist() == [
        10 * cost.per_token + 58 * 56,
        10 * cost.per_token + 100 * 56,
    ]
