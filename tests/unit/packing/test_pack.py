import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.errors import PlanError
from megasft.packing.pack import best_fit


@given(
    st.lists(st.integers(1, 32), min_size=0, max_size=80),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 3),
)
def test_every_sample_lies_in_exactly_one_row_that_holds_it(
    lengths: list[int], align: int, seed: int
) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), row_tokens=32, align_tokens=align, seed=seed)

    assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
    for r in range(len(rows)):
        filled = sum(-(-lengths[i] // align) * align for i in rows[r])
        assert 0 < filled <= 32


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_rows_are_those_of_a_sample_by_sample_best_fit(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(32 - length)

    rows = best_fit(np.array(lengths), row_tokens=32)

    ours = [32 - sum(lengths[i] for i in rows[r]) for r in range(len(rows))]
    assert sorted(ours) == sorted(room)


def test_a_sample_of_exactly_a_row_fills_it_alone() -> None:
    rows = best_fit(np.array([8, 8, 1]), row_tokens=8)

    assert sorted(rows[r].tolist() for r in range(len(rows))) == [[0], [1], [2]]


def test_the_seed_decides_which_of_equally_long_samples_goes_where_and_nothing_else() -> None:
    lengths = np.full(40, 4)
    a, again, other = (best_fit(lengths, row_tokens=8, seed=s) for s in (1, 1, 2))

    assert a.samples.tolist() == again.samples.tolist() != other.samples.tolist()
    assert a.borders.tolist() == other.borders.tolist() == list(range(0, 41, 2))


def test_no_samples_make_no_rows() -> None:
    assert len(best_fit(np.zeros(0, np.int64), row_tokens=8)) == 0


@pytest.mark.parametrize(("lengths", "align"), [([3, 9], 1), ([3, 8], 3), ([0, 3], 1)])
def test_a_sample_that_fits_no_row_is_refused(lengths: list[int], align: int) -> None:
    with pytest.raises(PlanError, match="cannot be placed in a row of 8"):
        best_fit(np.array(lengths), row_tokens=8, align_tokens=align)
