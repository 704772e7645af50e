import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.packing.in_order import one_each, sequential


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.sampled_from([1, 4]))
def test_sequential_rows_hold_neighbours_and_end_where_the_next_sample_does_not_fit(
    lengths: list[int], align: int
) -> None:
    rows = sequential(np.array(lengths), row_tokens=16, align_tokens=align)

    assert rows.samples.tolist() == list(range(len(lengths)))
    padded = [-(-n // align) * align for n in lengths]
    for r in range(len(rows) - 1):
        filled = sum(padded[i] for i in rows[r])
        assert filled + padded[int(rows[r + 1][0])] > 16


def test_a_row_each_is_the_order_of_the_store() -> None:
    rows = one_each(np.array([3, 1, 2]), row_tokens=8)
    assert [rows[r].tolist() for r in range(len(rows))] == [[0], [1], [2]]
