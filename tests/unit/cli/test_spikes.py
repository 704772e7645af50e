from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.report.spikes import SampleLoss, Spike, SpikeFile
from megasft.store import StoreWriter
from tests.stores import VOCAB, random_samples

from .conftest import Seen

Megasft = Callable[..., Seen]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    with StoreWriter(store, vocab_size=VOCAB) as writer:
        for line, one in enumerate(random_samples(9, seed=1), start=1):
            writer.add(one, source=0, line=line)
        writer.finish({"counts": {}, "categories": {}, "sources": [{"path": "made.jsonl"}]})
    file = SpikeFile(tmp_path / "run" / "log", stores=[str(store)], factor=1.5)
    samples = (SampleLoss(4, 7.5, 12), SampleLoss(2, 3.25, 1024), SampleLoss(8, 0.5, 3))
    file.write(Spike(812, 4.0, 1.6, file.stores, samples))
    file.write(Spike(900, 3.0, 1.5, file.stores, ()))
    return tmp_path / "run"


def test_spikes_are_listed_and_the_conversations_of_one_by_loss(
    run: Path, megasft: Megasft
) -> None:
    seen = megasft("spikes", run)
    assert seen.code == 0
    assert seen.out.splitlines() == [
        "step 812: loss 4.0000, 2.50 times the median before, 1.6000; 3 conversations",
        "step 900: loss 3.0000, 2.00 times the median before, 1.5000; 0 conversations",
    ]
    lines = megasft("spikes", run, "--step", 812).out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["7.5000", "12", "4"],
        ["3.2500", "1,024", "2"],
        ["0.5000", "3", "8"],
    ]
    assert lines[2].endswith("made.jsonl:5"), "sample 4 was the fifth line"
    short = megasft("spikes", run, "--step", 812, "--top", 1).out
    assert "made.jsonl:5" in short and "made.jsonl:3" not in short and "and 2 more" in short


def test_a_step_that_was_no_spike_names_those_that_were(run: Path, megasft: Megasft) -> None:
    seen = megasft("spikes", run, "--step", 5)
    assert seen.code == 1 and "step 5 was no spike" in seen.err and "812, 900" in seen.err
    assert "has no spikes.jsonl" in megasft("spikes", run.parent).err
