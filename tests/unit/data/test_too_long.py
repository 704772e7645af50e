import numpy as np
import pytest

from megasft.data.too_long import Limit, shorten
from megasft.schema import Sample, turn_records

# tokens 0..11; turns at [2, 5) and [8, 11)
SAMPLE = Sample(np.arange(12, dtype=np.int32), turn_records([(2, 3, 0, 1), (8, 3, 0, 3)]))


@pytest.mark.parametrize(
    ("policy", "room", "num_tokens", "turns", "lost"),
    [
        ("truncate-turns", 11, 11, [[2, 3], [8, 3]], (1, 0)),
        ("truncate-turns", 10, 5, [[2, 3]], (7, 3)),
        ("truncate-turns", 5, 5, [[2, 3]], (7, 3)),
        ("truncate-turns", 4, None, [], (12, 6)),
        ("truncate", 10, 10, [[2, 3], [8, 2]], (2, 1)),
        ("truncate", 8, 8, [[2, 3]], (4, 3)),
        ("truncate", 2, None, [], (12, 6)),
        ("drop", 11, None, [], (12, 6)),
    ],
)
def test_what_is_left_and_what_is_lost(
    policy: str, room: int, num_tokens: int | None, turns: list[list[int]], lost: tuple[int, int]
) -> None:
    limit = Limit(room, policy)
    assert limit.exceeded_by(SAMPLE)
    cut = shorten(SAMPLE, limit)
    assert (cut.lost_tokens, cut.lost_labels) == lost
    if num_tokens is None:
        assert cut.sample is None
        return
    assert cut.sample is not None
    assert cut.sample.tokens.tolist() == list(range(num_tokens))
    assert cut.sample.turns[:, :2].tolist() == turns
    assert cut.is_mid_turn == (policy == "truncate" and room == 10)
    assert SAMPLE.turns[:, 1].tolist() == [3, 3]  # the original is not written to


def test_only_a_longer_sample_is_too_long() -> None:
    assert not Limit(12).exceeded_by(SAMPLE)
    assert not Limit(0).exceeded_by(SAMPLE)
    assert Limit(11).exceeded_by(SAMPLE)


@pytest.mark.parametrize(
    ("policy", "limits", "kept", "size"),
    [
        # The turns are [3, 5), [8, 12) and [14, 15) of 16 tokens; prompts of 3, 3 and 2.
        ("truncate-turns", {"max_prompt_tokens": 3}, None, 16),
        ("truncate-turns", {"max_prompt_tokens": 2}, [], 0),
        ("truncate-turns", {"max_answer_tokens": 4}, None, 16),
        ("truncate-turns", {"max_answer_tokens": 3}, [2], 5),
        ("truncate-turns", {"max_answer_tokens": 1}, [], 0),
        ("truncate", {"max_answer_tokens": 3}, [2, 3], 11),
        ("truncate", {"max_answer_tokens": 3, "max_tokens": 9}, [2, 1], 9),
        ("drop", {"max_answer_tokens": 3}, [], 0),
        ("truncate-turns", {"max_answer_tokens": 3, "max_prompt_tokens": 9}, [2], 5),
        ("truncate-turns", {"max_tokens": 13, "max_prompt_tokens": 3}, [2, 4], 12),
    ],
)
def test_a_prompt_and_an_answer_have_limits_of_their_own(
    policy: str, limits: dict[str, int], kept: list[int] | None, size: int
) -> None:
    turns = turn_records([(3, 2, 0, 1), (8, 4, 0, 3), (14, 1, 0, 5)])
    sample, limit = Sample(np.arange(16, dtype=np.int32), turns), Limit(policy=policy, **limits)
    assert limit.exceeded_by(sample) == (kept is not None)
    if kept is None:
        return
    cut = shorten(sample, limit)
    left = cut.sample.turns[:, 1].tolist() if cut.sample else []
    assert left == kept
    assert (len(cut.sample.tokens) if cut.sample else 0) == size
    assert cut.lost_tokens == 16 - size
    assert cut.lost_labels == 7 - sum(kept)
