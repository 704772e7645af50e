"""The blocks of all ranks cover each visible pair once; literal layouts; windows that matter."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megasft.attention.blocks import RowLayout, row_order
from megasft.cp_layout import zigzag_positions

BORDERS = (0, 8, 16, 40, 48)


def layout(borders: tuple[int, ...], rank: int, cp_size: int) -> RowLayout:
    return RowLayout(borders=borders, cp_rank=rank, cp_size=cp_size, device=torch.device("cpu"))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_steps_of_all_ranks_cover_every_visible_pair_exactly_once(cp_size: int) -> None:
    count = np.zeros((48, 48), dtype=int)
    for rank in range(cp_size):
        for step in layout(BORDERS, rank, cp_size).steps(None):
            block = step.block
            for q, k in zip(pairwise(block.borders_q), pairwise(block.borders_k), strict=True):
                rows, columns = block.positions_q[slice(*q)], block.positions_k[slice(*k)]
                seen = np.ones((len(rows), len(columns)), dtype=int)
                count[np.ix_(rows, columns)] += np.tril(seen) if block.is_causal else seen

    document = np.searchsorted(BORDERS, np.arange(48), side="right")
    expected = np.tril(document[:, None] == document[None, :])
    assert (count == expected).all()


@pytest.mark.parametrize("cp_size", [2, 4])
def test_every_meeting_costs_the_same(cp_size: int) -> None:
    """Else the ring waits for its slowest rank in every step."""
    for rank in range(cp_size):
        others = layout(BORDERS, rank, cp_size).steps(None)[1:]
        assert {
            sum(
                (q[1] - q[0]) * (k[1] - k[0])
                for q, k in zip(
                    pairwise(step.block.borders_q), pairwise(step.block.borders_k), strict=True
                )
            )
            for step in others
        } == {sum((b - a) ** 2 for a, b in pairwise(BORDERS)) // cp_size**2 // 2}


def test_a_later_rank_is_met_by_back_slices_and_an_earlier_one_with_front_slices() -> None:
    # shares of 8 tokens: 0 1 6 7 | 2 3 4 5
    first, second = (layout((0, 8), rank, 2).steps(None) for rank in (0, 1))
    assert [step.source for step in first] == [0, 1]
    assert first[1].block.positions_q.tolist() == [6, 7]
    assert first[1].block.positions_k.tolist() == [2, 3, 4, 5]
    assert [step.source for step in second] == [1, 0]
    assert second[1].block.positions_q.tolist() == [2, 3, 4, 5]
    assert second[1].block.positions_k.tolist() == [0, 1]


def test_layers_share_the_steps_of_a_row() -> None:
    row = layout(BORDERS, 0, 2)
    assert row.steps(None) is row.steps(None)
    assert row.steps(3) is not row.steps(None)


def test_pieces_of_one_size_are_one_batch() -> None:
    (step,) = layout((0, 2, 5, 7), 0, 1).steps(None)
    assert [q.tolist() for q, _ in step.block.batches] == [[[0, 1], [5, 6]], [[2, 3, 4]]]


def test_a_window_as_long_as_every_document_is_no_window() -> None:
    row = layout(BORDERS, 0, 1)  # the longest document has 24 tokens
    assert row.window_that_matters(None) is None
    assert row.window_that_matters(23) is None
    assert row.window_that_matters(22) == 22


@pytest.mark.parametrize("cp_size", [2, 4])
def test_gathered_shares_come_back_in_row_order(cp_size: int) -> None:
    cu = np.array(BORDERS)
    shares = [zigzag_positions(cu, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    gathered = torch.from_numpy(np.concatenate(shares))

    assert gathered[row_order(BORDERS, cp_size=cp_size)].tolist() == list(range(48))
