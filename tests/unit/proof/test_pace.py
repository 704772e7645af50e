import pytest

from megasft.proof.pace import announcement, expected_seconds


def test_imports_and_starts_are_waited_for_once_and_ranks_share_the_cores() -> None:
    first, second, wide, next_wide = expected_seconds([2, 2, 8, 8], cores=2)

    assert first > 3 * second, "imports take longer than a run"
    assert wide > next_wide + 8 > 2 * second + 8, "8 ranks on 2 cores"
    assert list(expected_seconds([8], cores=8)) == [first]


def test_the_whole_proof_on_two_cores_takes_what_it_took() -> None:
    """857 s for 270 runs, alone on a machine of two cores; and a little less since."""
    ranks = [1] * 32 + [2] * 112 + [4] * 80 + [8] * 46
    assert announcement(ranks, cores=2) == "270 runs on up to 8 ranks, about 13 minutes on 2 cores"


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
