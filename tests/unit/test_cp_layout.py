import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.cp_layout import Span, alignment, attention_spans, zigzag_positions
from megasft.errors import AlignmentError


def borders_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def test_each_rank_owns_a_front_and_a_back_slice_of_each_document() -> None:
    cu = np.array([0, 8, 12])  # slices of 2 and of 1

    assert zigzag_positions(cu, cp_rank=0, cp_size=2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_positions(cu, cp_rank=1, cp_size=2).tolist() == [2, 3, 4, 5, 9, 10]


def test_without_context_parallelism_a_rank_owns_everything_of_any_length() -> None:
    assert zigzag_positions(np.array([0, 3, 7]), cp_rank=0, cp_size=1).tolist() == list(range(7))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([2, 3, 4]))
def test_the_shares_partition_the_row(sizes: list[int], cp_size: int) -> None:
    cu = borders_of([2 * cp_size * n for n in sizes])

    shares = [zigzag_positions(cu, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]

    assert sorted(np.concatenate(shares).tolist()) == list(range(cu[-1]))
    assert all(np.all(np.diff(share) > 0) for share in shares)
    assert len({len(share) for share in shares}) == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
def test_spans_show_each_query_exactly_its_document_up_to_itself(
    sizes: list[int], cp_size: int
) -> None:
    cu = borders_of([2 * cp_size * n for n in sizes])
    for rank in range(cp_size):
        positions = zigzag_positions(cu, cp_rank=rank, cp_size=cp_size)
        seen = {}
        for span in attention_spans(cu, cp_rank=rank, cp_size=cp_size):
            for i, query in enumerate(range(span.q_start, span.q_end)):
                last = span.k_end - (span.q_end - span.q_start) + i
                assert query not in seen
                seen[query] = (span.k_start, last)
        expected = {}
        for i, p in enumerate(positions.tolist()):
            start = int(cu[np.searchsorted(cu, p, side="right") - 1])
            expected[i] = (start, p)
        assert seen == expected


def test_spans_of_whole_documents() -> None:
    assert attention_spans(np.array([0, 3, 3, 5]), cp_rank=0, cp_size=1) == [
        Span(0, 3, 0, 3),
        Span(3, 5, 3, 5),
    ]


@pytest.mark.parametrize("cut", [zigzag_positions, attention_spans])
def test_an_unaligned_document_is_refused_with_its_number_and_length(cut) -> None:
    with pytest.raises(AlignmentError, match=r"document 1 has 6 tokens, which 4 "):
        cut(np.array([0, 4, 10]), cp_rank=0, cp_size=2)


def test_alignment_covers_zigzag_and_sequence_parallelism() -> None:
    assert alignment(cp_size=1, tp_size=4, sequence_parallel=False) == (1, 1)
    assert alignment(cp_size=4, tp_size=4, sequence_parallel=False) == (8, 8)
    assert alignment(cp_size=2, tp_size=3, sequence_parallel=True) == (4, 12)
