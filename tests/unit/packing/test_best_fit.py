import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.packing.best_fit import best_fit, fill


def fill_one_by_one(lengths: list[int], rooms: list[int], row_tokens: int) -> list[int]:
    """Room left in each row, by the definition of best fit decreasing."""
    room = [*rooms]
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(row_tokens - length)
    return room


@settings(deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_rows_are_those_of_a_sample_by_sample_best_fit(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths), row_tokens=32)

    ours = [32 - sum(lengths[i] for i in rows[r]) for r in range(len(rows))]
    assert sorted(ours) == sorted(fill_one_by_one(lengths, [], 32))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=40),
    st.lists(st.integers(0, 32), max_size=20),
)
def test_rows_that_are_there_already_are_filled_first(lengths: list[int], rooms: list[int]) -> None:
    histogram = np.bincount(lengths, minlength=33)
    row_of = fill(histogram, row_tokens=32, rooms=np.array(rooms, np.int64))

    left = np.array([*rooms, *([32] * len(lengths))])
    np.subtract.at(left, row_of, np.sort(lengths)[::-1])
    opened = left[: max(len(rooms), int(row_of.max()) + 1)]
    assert sorted(opened.tolist()) == sorted(fill_one_by_one(lengths, rooms, 32))


def test_a_row_is_filled_before_the_next_is_begun() -> None:
    rows = best_fit(np.array([4, 4, 4, 4, 4]), row_tokens=8)
    assert [len(rows[r]) for r in range(len(rows))] == [2, 2, 1]
