"""What holds for every packer; each one's own promise is tested in its own file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.errors import PlanError
from megasft.packing.pack import DEFAULT_PACKER, PACKERS

every_packer = pytest.mark.parametrize("name", PACKERS)


@every_packer
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=0, max_size=80),
    align=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 3),
)
def test_every_sample_lies_in_exactly_one_row_that_holds_it(
    name: str, lengths: list[int], align: int, seed: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = PACKERS[name](array, row_tokens=32, align_tokens=align, seed=seed)

    placed = [int(i) for r in range(len(rows)) for i in rows[r]]
    assert sorted(placed) == list(range(len(lengths)))
    for r in range(len(rows)):
        filled = sum(-(-lengths[i] // align) * align for i in rows[r])
        assert 0 < filled <= 32


@every_packer
def test_a_sample_of_exactly_a_row_fills_it_alone(name: str) -> None:
    rows = PACKERS[name](np.array([8, 8, 1]), row_tokens=8)

    assert sorted(rows[r].tolist() for r in range(len(rows))) == [[0], [1], [2]]


@every_packer
def test_the_seed_decides_which_of_equally_long_samples_goes_where_and_nothing_else(
    name: str,
) -> None:
    lengths = np.full(40, 4)
    a, again, other = (PACKERS[name](lengths, row_tokens=8, seed=s) for s in (1, 1, 2))

    assert a.samples.tolist() == again.samples.tolist()
    assert a.borders.tolist() == other.borders.tolist()
    keeps_order = name in ("sequential", "none")
    assert (a.samples.tolist() == other.samples.tolist()) is keeps_order


@every_packer
def test_no_samples_make_no_rows(name: str) -> None:
    assert len(PACKERS[name](np.zeros(0, np.int64), row_tokens=8)) == 0


@every_packer
@pytest.mark.parametrize(("lengths", "align"), [([3, 9], 1), ([3, 8], 3), ([0, 3], 1)])
def test_a_sample_that_fits_no_row_is_refused(name: str, lengths: list[int], align: int) -> None:
    with pytest.raises(PlanError, match="cannot be placed in a row of 8"):
        PACKERS[name](np.array(lengths), row_tokens=8, align_tokens=align)


def test_the_default_is_a_packer() -> None:
    assert DEFAULT_PACKER in PACKERS
