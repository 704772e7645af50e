import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megasft.batch.assemble import assemble
from megasft.batch.context_parallel import shard
from tests.stores import random_samples, sample


def test_labels_are_shifted_and_carry_what_the_loss_asks() -> None:
    #          0   1   2   3   4   5   6
    first = sample([10, 11, 12, 13, 14, 15, 16], (2, 2), (5, 2))
    second = sample([20, 21, 22], (1, 1))

    row = assemble([first, second], row_tokens=16, align_tokens=4, pad_token=99)

    x = 99
    assert row["tokens"].tolist() == [10, 11, 12, 13, 14, 15, 16, x, 20, 21, 22, x, x, x, x, x]
    assert row["labels"].tolist() == [0, 12, 13, 0, 15, 16, 0, 0, 21, 0, 0, 0, 0, 0, 0, 0]
    assert row["turn_tokens"].tolist() == [0, 2, 2, 0, 2, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert row["sample_tokens"].tolist() == [0, 4, 4, 0, 4, 4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(row["ends_turn"]).tolist() == [2, 5, 8]
    assert np.flatnonzero(row["ends_sample"]).tolist() == [5, 8]
    assert row["position_ids"].tolist() == [*range(8), *range(4), *range(4)]
    assert row["cu_seqlens"].tolist() == [0, 8, 12, 16]  # the tail pad is its own document
    assert row["cu_seqlens_unpadded"].tolist() == [0, 7, 10, 10]


def test_the_last_token_of_an_exactly_full_row_is_trained() -> None:
    row = assemble([sample([1, 2, 3, 4], (3, 1))], row_tokens=4, align_tokens=4, pad_token=0)

    assert row["labels"].tolist() == [0, 0, 4, 0]
    assert row["cu_seqlens"].tolist() == [0, 4]


def test_a_padding_id_that_is_also_a_label_is_still_trained() -> None:
    row = assemble([sample([7, 0, 0], (1, 2))], row_tokens=4, align_tokens=1, pad_token=0)

    assert row["turn_tokens"].tolist() == [2, 2, 0, 0]


def test_a_row_of_padding_and_a_sample_without_turns_weigh_nothing() -> None:
    for samples in ([], [sample([1, 2])]):
        row = assemble(samples, row_tokens=4, align_tokens=2, pad_token=0)
        assert not row["turn_tokens"].any() and not row["ends_turn"].any()
        assert row["cu_seqlens"][-1] == 4


@given(st.integers(0, 20), st.sampled_from([1, 2, 4]))
def test_cutting_a_micro_batch_loses_no_label_and_changes_no_fact(seed: int, cp_size: int) -> None:
    samples = random_samples(6, seed=seed, longest=30)
    whole = assemble(samples, row_tokens=96, align_tokens=8, pad_token=0, samples_per_row=[3, 3])

    shares = [shard(whole, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]

    for name in ("labels", "turn_tokens", "sample_tokens", "ends_turn", "ends_sample"):
        together = np.concatenate([s[name] for s in shares])
        assert sorted(together.tolist()) == sorted(whole[name].tolist())
    num_turns = sum(len(s.turns) for s in samples)
    assert sum(int(s["ends_turn"].sum()) for s in shares) == num_turns > 0
    weights = [1 / n for s in shares for n in s["turn_tokens"].tolist() if n]
    assert abs(sum(weights) - num_turns) < 1e-9
    assert all(s["cu_seqlens"].tolist() == whole["cu_seqlens"].tolist() for s in shares)


def test_turns_cut_by_context_parallelism_are_counted_once() -> None:
    row = assemble([sample(list(range(16)), (2, 14))], row_tokens=16, align_tokens=4, pad_token=0)

    shares = [shard(row, cp_rank=r, cp_size=2) for r in range(2)]

    assert [int(s["ends_turn"].sum()) for s in shares] == [1, 0]
    assert [int((s["turn_tokens"] > 0).sum()) for s in shares] == [6, 8]  # both hold labels
    assert all(set(s["turn_tokens"].tolist()) <= {0, 14} for s in shares)


def test_rows_of_a_micro_batch_keep_their_borders() -> None:
    one = sample([1, 2, 3], (1, 1))

    both = assemble(
        [one, one], row_tokens=4, align_tokens=1, pad_token=0, samples_per_row=[1, 0, 1]
    )

    assert both["cu_seqlens"].tolist() == [0, 3, 4, 8, 11, 12]
    assert both["cu_seqlens_unpadded"].tolist() == [0, 3, 3, 3, 6, 6]
    assert both["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 0]
    assert both["labels"].tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]
