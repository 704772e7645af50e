import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasft.batch.dataset import PackedRows, RowShape
from megasft.megatron import cpu
from megasft.megatron.global_batch import GlobalBatch, GlobalBatches
from megasft.packing.plan import plan_rows
from megasft.report.spikes import FILE, read_spikes
from megasft.schema import SFTBatch
from megasft.training.datasets import PlannedStore
from megasft.training.spikes import Spikes
from tests.stores import random_samples, write_store


def flags(store: Path, log: Path) -> SimpleNamespace:
    given = {"rank": 0, "megasft_data": [str(store)], "megasft_spikes": 2.0}
    return SimpleNamespace(**given, save=None, megasft_log_dir=str(log))


class FirstBatch(GlobalBatches):
    """The run is at its first global batch, of 6 rows."""

    def now(self, args: Any) -> GlobalBatch:
        return self.at(0, num_rows=6)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_conversations_of_a_step_get_their_losses_in_whatever_order_rows_are_read(
    tmp_path: Path, cp_size: int
) -> None:
    """Micro-batches of two rows, none in the order of the plan; a label's loss is its token / 7."""
    cpu.prepare()
    samples = random_samples(60, seed=3)
    store = write_store(tmp_path / "store", samples)
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1)
    assert any(len(plan.rows[row]) > 1 for row in range(len(plan)))
    batches = FirstBatch(plan, seed=9, objective="turn")
    rows = batches.now(None).rows
    args = flags(store.path, tmp_path / "log")
    spikes = Spikes(args, PlannedStore(store, plan), batches)

    for cp_rank in range(cp_size):
        shape = RowShape(64, 8, pad_token=0, cp_rank=cp_rank, cp_size=cp_size)
        dataset = PackedRows([(store, plan.rows)], rows, length=6, shape=shape)
        for positions in ([3, 0], [5, 1], [2, 4]):
            (fields,) = dataset.__getitems__(positions)
            batch = SFTBatch(**fields)
            spikes.add(torch.where(batch.turn_tokens > 0, batch.labels / 7, torch.nan), batch)

    sums = spikes.sums()
    found = dict(zip([i for row in rows for i in plan.rows[row].tolist()], sums, strict=False))
    assert len(found) == len(sums) - 1 > 6
    for number, (ce, labels) in found.items():
        tokens, turns = samples[number].tokens, samples[number].turns.tolist()
        trained = [tokens[t] for start, size, *_ in turns for t in range(start, start + size)]
        assert labels == len(trained)
        assert float(ce) == pytest.approx(sum(trained) / 7, rel=1e-6)
    assert sums[-1].tolist() == [0.0, 0.0], "padding has no label"
    assert not spikes.sums().any(), "the next step starts from zero"


def test_a_step_above_the_median_is_kept_and_a_disk_that_fails_ends_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megasft"), "propagate", True)
    store = write_store(tmp_path / "store", random_samples(20, seed=3))
    plan = plan_rows(store, row_tokens=64, align_tokens=8, seed=1)
    batches, log = FirstBatch(plan, seed=9, objective="turn"), tmp_path / "log"
    spikes = Spikes(flags(store.path, log), PlannedStore(store, plan), batches)
    samples = [i for row in batches.now(None).rows for i in plan.rows[row].tolist()]
    sums = torch.tensor([[2.0 * n, 2.0] for n in range(len(samples) + 1)])

    for step, loss in enumerate((1.0, 1.0, 1.0, 1.9, 2.5), start=1):
        spikes.stepped(step, loss, sums)
    (spike,) = read_spikes(log)
    assert (spike.step, spike.loss, spike.median) == (5, 2.5, 1.0)
    assert [one.sample for one in spike.samples] == samples[::-1]
    assert "step 5: loss 2.5000 is 2.50 times the median" in caplog.text

    (log / FILE).unlink()
    (log / FILE).mkdir()
    spikes.stepped(6, 9.0, sums)
    assert spikes.file is None and "no more spikes are kept, training goes on" in caplog.text
    spikes.stepped(7, 9.0, sums)
