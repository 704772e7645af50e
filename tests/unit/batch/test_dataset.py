from pathlib import Path

import torch
from torch.utils.data import DataLoader

from megasft.batch.dataset import PackedRows, RowShape, WholeSet
from megasft.packing.order import RowOrder
from megasft.packing.plan import plan_rows
from megasft.schema import SFTBatch
from tests.stores import random_samples, write_store


def test_a_loader_yields_whole_micro_batches_with_megatrons_batch_dimension(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_samples(40, seed=0))
    plan = plan_rows(store, row_tokens=64, align_tokens=4, seed=0)
    shape = RowShape(row_tokens=64, align_tokens=4, pad_token=0)
    order = RowOrder(num_rows=len(plan), seed=0)
    rows = PackedRows([(store, plan.rows)], order, length=12, shape=shape)

    batches = list(DataLoader(rows, batch_size=2, num_workers=0))

    assert len(batches) == 6
    for step, batch in enumerate(batches):
        assert set(batch) == set(SFTBatch._fields)
        assert batch["tokens"].shape == (1, 128) and batch["tokens"].dtype == torch.int64
        assert batch["cu_seqlens"].dtype == torch.int32 and batch["cu_seqlens"][0, -1] == 128
        wanted = [order[2 * step], order[2 * step + 1]]
        assert batch["row_ids"].tolist() == [wanted]
        assert batch["set_ids"].tolist() == [[0, 0]]
        assert int(batch["ends_turn"].sum()) == plan.turns[wanted].sum()
        assert int((batch["turn_tokens"] > 0).sum()) == plan.labels[wanted].sum()


def test_a_validation_pass_sees_each_row_once_wherever_it_starts() -> None:
    order = WholeSet(num_rows=5, period=8)

    for start in (0, 3, 11):
        seen = [order[k] for k in range(start, start + 8)]
        assert sorted(r for r in seen if r is not None) == list(range(5))
        assert seen.count(None) == 3
