import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasft.megatron.global_batch import GlobalBatches
from megasft.report.record import Record
from megasft.training import datasets, saving
from megasft.training.report import Report
from tests.one_rank import one_rank, validated
from tests.stores import random_samples, write_store
from tests.unit.report.records import STEP


class Flaky:
    """A sink that fails from its second step on."""

    def __init__(self) -> None:
        self.steps = 0

    def write(self, _record: Record) -> None:
        self.steps += 1
        if self.steps > 1:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError


def test_a_sink_that_fails_is_left_out_with_a_warning_and_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megasft"), "propagate", True)
    report = Report.__new__(Report)
    flaky, sound = Flaky(), Flaky()
    sound.steps = -9
    report._sinks = [flaky, sound]
    for _ in range(3):
        report._write(lambda sink: sink.write(STEP))
    assert (flaky.steps, sound.steps) == (2, -6)
    assert report._sinks == [sound]
    assert "Flaky: OSError: [Errno 28] No space left on device; nothing more is written" in (
        caplog.text
    )


class Optimizer:
    """What Megatron's optimizers offer of what is used."""

    param_groups = ({"lr": 0.5, "default_config": True},)

    def scale_loss(self, loss: Any) -> Any:
        return loss

    def step(self) -> Any:
        return True, 2.5, 0


class Kept(list[Record]):
    """A sink that keeps the records."""

    def write(self, record: Record) -> None:
        self.append(record)


def test_a_step_is_numbered_from_1_and_its_rows_are_part_of_the_epoch(tmp_path: Path) -> None:
    write_store(tmp_path / "store", random_samples(150, seed=1))
    run = ("--global-batch-size", "8", "--train-iters", "9", "--lr", "0.5")
    args = validated("--megasft-data", str(tmp_path / "store"), *run)
    data = datasets.open_data(args)
    num_rows, kept, optimizer = len(data.train.plan), Kept(), Optimizer()
    assert num_rows > 16
    config = SimpleNamespace(grad_scale_func=optimizer.scale_loss)

    with one_rank(args):
        batches = GlobalBatches(data.train.plan, seed=args.seed, objective="turn")
        report = Report(args, data, batches, saving.Keeper(args, rank=0))
        report._sinks = [kept]
        for step in range(2):  # as Megatron counts steps and rows while it trains
            args.curr_iteration, args.consumed_train_samples = step, 8 * step
            report.begin_step()
            report.finalize(config, torch.tensor(batches.now(args).units))
            optimizer.step()

    assert [(record.step, record.num_steps) for record in kept] == [(1, 9), (2, 9)]
    epochs = [record.epoch for record in kept]
    assert epochs == pytest.approx([8 / num_rows, 16 / num_rows])
