"""Each defect does what it is named for, on shares one can check by eye."""

import pytest
import torch

from megasft.batch.assemble import assemble
from megasft.batch.context_parallel import shard
from megasft.loss.loss_func import sft_loss
from megasft.proof.defects import DEFECTS
from megasft.ranks.layout import Layout
from megasft.schema import SFTBatch
from tests.batches import batch_of
from tests.stores import sample

# Labels at 1..6 (one turn of 6) and at 10 (a turn of 1); 16 tokens, CP 2 cuts at 4, 8 and 12.
ROW = assemble(
    [sample(list(range(16)), (2, 6), (11, 1))], row_tokens=16, align_tokens=4, pad_token=0
)


def share(cp_rank: int, cp_size: int = 2) -> SFTBatch:
    return batch_of(shard(ROW, cp_rank=cp_rank, cp_size=cp_size))


def labels(batch: SFTBatch) -> list[int]:
    return batch.position_ids[batch.turn_tokens > 0].tolist()


def test_cp_seam_loses_the_last_label_of_each_slice() -> None:
    break_share = DEFECTS["cp-seam"].share

    assert labels(share(0)) == [1, 2, 3] and labels(share(1)) == [4, 5, 6, 10]
    assert labels(break_share(share(0))) == [1, 2]
    assert labels(break_share(share(0, cp_size=1))) == [1, 2, 3, 4, 5, 6, 10]


def test_double_count_counts_a_turn_on_both_of_its_shares() -> None:
    counts = []
    for rank in (0, 1):
        batch = share(rank)
        right = sft_loss(torch.ones(8), batch=batch)
        counts.append((int(right.units), int(DEFECTS["double-count"].loss(right, batch).units)))

    assert counts == [(0, 1), (2, 2)]
    whole = share(0, cp_size=1)
    right = sft_loss(torch.ones(16), batch=whole)
    assert int(DEFECTS["double-count"].loss(right, whole).units) == int(right.units) == 2


def test_per_row_mean_and_token_divisor_change_the_divisor() -> None:
    whole = share(0, cp_size=1)
    right = sft_loss(torch.ones(16), batch=whole)

    by_row = DEFECTS["per-row-mean"].loss(right, whole)
    by_token = DEFECTS["token-divisor"].loss(right, whole)

    assert (float(right.loss_sum), int(right.units)) == pytest.approx((2.0, 2))
    assert (float(by_row.loss_sum), int(by_row.units)) == pytest.approx((1.0, 1))
    assert (float(by_token.loss_sum), int(by_token.units)) == pytest.approx((2.0, 7))


def test_a_defect_of_the_cut_shows_only_where_rows_are_cut() -> None:
    for name, defect in DEFECTS.items():
        assert defect.shows_on(Layout(2, cp=2))
        assert defect.shows_on(Layout(2)) == (name in ("per-row-mean", "token-divisor"))
