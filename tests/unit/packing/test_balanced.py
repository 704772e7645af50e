import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.packing.balance import LLAMA_8B
from megasft.packing.balanced import EVEN_TOKENS, ROWS_ADDED, balanced, lower_bound
from megasft.packing.best_fit import best_fit
from megasft.packing.rows import Rows


def reasoning(num: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Long single-turn answers: log-normal around 1,500 tokens, cut at 20,000."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(1500), 0.75, num)).astype(np.int64), 16, 20_000)


def costs(rows: Rows, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    of_samples = LLAMA_8B.of(lengths, lengths**2)[rows.samples]
    return np.array(np.add.reduceat(of_samples, rows.borders[:-1]))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("align", [1, 8])
def test_rows_of_a_mixed_store_cost_alike_and_are_as_few_as_can_be(seed: int, align: int) -> None:
    lengths = reasoning(20_000, seed=seed)
    rows = balanced(lengths, row_tokens=131_072, align_tokens=align)

    bound = lower_bound(-(-lengths // align) * align, row_tokens=131_072)
    cost, samples = costs(rows, lengths), np.diff(rows.borders)
    assert len(rows) <= bound + 1 < 310
    assert cost.max() / cost.mean() < 1.05
    assert samples.std() / samples.mean() < 0.1
    crowded = np.diff(best_fit(lengths, row_tokens=131_072).borders)
    assert crowded.std() / crowded.mean() > 0.5, "best fit must differ for this to say anything"


@settings(deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=150))
def test_there_are_hardly_more_rows_than_best_fit_needs(lengths: list[int]) -> None:
    array = np.array(lengths)
    ours, fewest = len(balanced(array, row_tokens=32)), len(best_fit(array, row_tokens=32))

    assert lower_bound(array, row_tokens=32) <= ours <= fewest + 1


@pytest.mark.parametrize(
    ("row_tokens", "shortest", "longest"), [(64, 3, 6), (512, 20, 60), (1000, 20, 200)]
)
def test_lengths_that_leave_gaps_are_left_to_best_fit(
    row_tokens: int, shortest: int, longest: int
) -> None:
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 20_000)
    ours, fewest = (pack(lengths, row_tokens=row_tokens) for pack in (balanced, best_fit))

    bound = lower_bound(lengths, row_tokens=row_tokens)
    assert len(ours) <= max(len(fewest), bound + int(ROWS_ADDED * bound))


def test_a_row_is_cheap_by_its_cost_and_not_by_its_tokens() -> None:
    # 60,000 tokens in one document or in two: attention makes the one dearer.
    lengths = np.array([60_000, 30_000, 30_000, *[1_000] * 80])
    rows = balanced(lengths, row_tokens=131_072)

    of_row = {int(lengths[rows[r]].max()): len(rows[r]) for r in range(len(rows))}
    assert of_row[60_000] < 30 < 50 < of_row[30_000]


@pytest.mark.parametrize(
    ("lengths", "bound"), [([8, 8], 2), ([5, 5, 5], 3), ([4, 4, 4], 2), ([1], 1), ([], 0)]
)
def test_the_lower_bound_counts_tokens_and_samples_too_long_to_share(
    lengths: list[int], bound: int
) -> None:
    assert lower_bound(np.array(lengths, np.int64), row_tokens=8) == bound


def test_a_long_sample_is_given_short_company_and_like_cost() -> None:
    lengths = np.array([*[2_000] * 96, 30_000, 60_000, 30_000])
    rows = balanced(lengths, row_tokens=104_000)

    inside = sorted(lengths[rows[r]].tolist() for r in range(len(rows)))
    assert [row.count(2_000) for row in inside] == [37, 37, 22]
    assert [max(row) for row in inside] == [30_000, 30_000, 60_000]
    together = lengths[best_fit(lengths, row_tokens=104_000)[0]]
    assert together[:2].tolist() == [60_000, 30_000], "best fit must differ"


def test_the_weight_of_attention_is_that_of_the_model_it_names() -> None:
    even = LLAMA_8B.per_token / LLAMA_8B.per_square
    assert pytest.approx(even, rel=0.01) == EVEN_TOKENS
