"""Rows shift as in Megatron's loop over documents, on every rank."""

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer import multi_token_prediction

from megasft.attention.blocks import RowLayout
from megasft.cp_layout import zigzag_positions
from megasft.megatron.core_attention import packed_row
from megasft.megatron.row_shift import replace_roll, row_shift, shifted


def boundaries_of(seed: int, cp_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, rng.integers(1, 7)) * 2 * cp_size
    return np.concatenate([[0], np.cumsum(lengths)])


def layout_of(boundaries: np.ndarray[Any, Any], rank: int, size: int) -> RowLayout:
    device = torch.device("cpu")
    borders = tuple(boundaries.tolist())
    return RowLayout(borders=borders, cp_rank=rank, cp_size=size, device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_row_shifts_as_in_megatrons_loop(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = multi_token_prediction.roll_tensor
    monkeypatch.setattr(multi_token_prediction, "roll_tensor", original)
    replace_roll()
    replaced = multi_token_prediction.roll_tensor
    assert replaced is not original
    for seed in range(20):
        boundaries = boundaries_of(seed, 1)
        tokens = torch.arange(1, boundaries[-1] + 1)[None].to(dtype)
        cu_seqlens = torch.from_numpy(boundaries.astype(np.int32))
        row = packed_row(cu_seqlens, tokens[0].long(), cp_rank=0, cp_size=1)
        found = replaced(tokens, shifts=-1, dims=-1, cp_group=None, packed_seq_params=row)
        wanted = original(tokens, shifts=-1, dims=-1, cp_group=None, packed_seq_params=row)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert found[0].dtype == dtype
    # Rows that are not ours go Megatron's way.
    assert torch.equal(replaced(tokens, -1, -1)[0], original(tokens, -1, -1)[0])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_shift_as_the_whole_row(size: int) -> None:
    for seed in range(20):
        boundaries = boundaries_of(seed, size)
        tokens = np.arange(1, boundaries[-1] + 1)
        following = np.append(tokens[1:], 0)
        following[boundaries[1:] - 1] = 0
        owned = [zigzag_positions(boundaries, cp_rank=r, cp_size=size) for r in range(size)]
        shards = [torch.from_numpy(tokens[mine]) for mine in owned]
        shifts = [row_shift(layout_of(boundaries, rank, size)) for rank in range(size)]
        nothing = torch.zeros(len(boundaries) - 1, dtype=torch.int64)
        for rank in range(size):
            is_last = rank == size - 1
            front = nothing if is_last else shards[rank + 1][shifts[rank + 1].front]
            back = nothing if rank == 0 else shards[rank - 1][shifts[rank - 1].back]
            found = shifted(shards[rank], shifts[rank], torch.cat((front, back)))
            assert found.tolist() == following[owned[rank]].tolist()
