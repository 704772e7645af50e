from typing import Any

import pytest
import torch

from megasft.batch.assemble import assemble
from megasft.batch.context_parallel import shard
from megasft.cp_layout import zigzag_positions
from megasft.loss.auxiliary import mtp_mask, side_loss_scale
from megasft.schema import SFTBatch
from tests.batches import batch_of
from tests.stores import sample

ROW = assemble(
    [sample(list(range(19)), (2, 3), (7, 12)), sample(list(range(8)), (1, 7)), sample([1, 2])],
    row_tokens=64,
    align_tokens=8,
    pad_token=0,
)


def share(cp_rank: int, cp_size: int) -> SFTBatch:
    columns: dict[str, Any] = shard(ROW, cp_rank=cp_rank, cp_size=cp_size)
    return batch_of(columns)


def whole(mask_of_share: Any, cp_size: int) -> torch.Tensor:
    """Put the masks of all shares back in row order."""
    row = torch.full((64,), -1, dtype=torch.int64)
    for rank in range(cp_size):
        mine = zigzag_positions(ROW["cu_seqlens"], cp_rank=rank, cp_size=cp_size)
        row[torch.from_numpy(mine)] = mask_of_share(share(rank, cp_size), cp_size).long()
    return row


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_mtp_mask_is_the_same_on_every_layout_and_never_crosses_a_seam(num_layers: int) -> None:
    masks = [
        whole(lambda b, cp: mtp_mask(b, cp_size=cp, num_layers=num_layers, num_slices=8), cp_size)
        for cp_size in (1, 2, 4)
    ]

    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    kept = masks[0].nonzero().flatten().tolist()
    # The first document has slices of 3 tokens; labels are at 1..3 and 6..17. The others have
    # slices of one token, which no label can leave backwards.
    wanted = [t for t in (1, 2, 3, *range(6, 18)) if t % 3 >= num_layers]
    assert kept == wanted and wanted


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_rolled_mtp_mask_keeps_its_count_on_every_share(cp_size: int) -> None:
    """Megatron scales MTP by count / rolled count on each rank; that ratio must be 1."""
    for rank in range(cp_size):
        batch = share(rank, cp_size)
        mask = mtp_mask(batch, cp_size=cp_size, num_layers=1, num_slices=8)
        follows = batch.position_ids[1:] == batch.position_ids[:-1] + 1

        assert int((mask[1:] * follows).sum()) == int(mask.sum())


def test_the_scale_turns_a_division_by_units_into_one_by_tokens() -> None:
    assert side_loss_scale(units=150, counted=131072) / 150 == pytest.approx(1 / 131072)
    assert side_loss_scale(units=0, counted=50) == pytest.approx(1 / 50), "Megatron divides by 1"
