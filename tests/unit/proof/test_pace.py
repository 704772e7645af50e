import pytest

from megasft.proof.pace import announcement, expected_seconds


def test_a_start_is_waited_for_once_and_ranks_share_the_cores() -> None:
    first, second, wide = expected_seconds([2, 2, 8], cores=2)

    assert first > 3 * second, "imports take longer than a run"
    assert wide > 3.5 * first, "8 ranks on 2 cores"
    assert list(expected_seconds([8], cores=8)) == [first]


@pytest.mark.parametrize(
    ("ranks", "cores", "text"),
    [
        ([1], 1, "1 run on 1 rank, about 1 minute on 1 core"),
        ([1, 2, 2], 2, "3 runs on up to 2 ranks, about 1 minute on 2 cores"),
        ([1] * 10 + [8] * 40, 4, "50 runs on up to 8 ranks, about 3 minutes on 4 cores"),
    ],
)
def test_the_first_line_says_how_much_and_how_long(ranks: list[int], cores: int, text: str) -> None:
    assert announcement(ranks, cores=cores) == text
