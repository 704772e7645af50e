import math
from pathlib import Path

import pytest

from megasft.errors import DataError
from megasft.report.spikes import SampleLoss, Spike, SpikeFile, highest_first, read_spikes


def file(folder: Path, *, factor: float = 1.5) -> SpikeFile:
    return SpikeFile(folder, stores=["store"], factor=factor)


def spike(step: int, *samples: SampleLoss) -> Spike:
    return Spike(step, loss=3.0, median=1.0, stores=("store",), samples=samples)


def test_a_spike_is_above_the_median_and_does_not_hide_the_next(tmp_path: Path) -> None:
    spikes = file(tmp_path)
    losses = [9.0, 8.0, 2.0, 2.0, 2.0, 3.1, 2.0, 9.0, 9.0, 2.0]
    found = [n for n, loss in enumerate(losses) if spikes.median_if_spike(loss) is not None]
    # The first three are too few to say; 3.1 is above 1.5 x 2, whatever the first two were.
    assert found == [5, 7, 8]


def test_samples_without_labels_are_left_out_and_the_dearest_is_first() -> None:
    sums = [(4.0, 2.0), (0.0, 0.0), (9.0, 3.0), (1.0, 1.0)]
    assert highest_first([10, 11, 12, 13], sums) == (
        SampleLoss(12, 3.0, 3),
        SampleLoss(10, 2.0, 2),
        SampleLoss(13, 1.0, 1),
    )


def test_what_is_written_is_read_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    kept = spike(5, SampleLoss(7, 2.5, 12), SampleLoss(3, 2.0, 8))
    first = file(tmp_path / "log")
    first.begin(1)
    for one in (kept, spike(8), spike(9)):
        first.write(one)
    resumed = file(tmp_path / "log")
    resumed.begin(8)
    resumed.write(spike(8, SampleLoss(1, 4.0, 1)))
    resumed.begin(9)

    for folder in (tmp_path, tmp_path / "log"):
        assert read_spikes(folder) == [kept, spike(8, SampleLoss(1, 4.0, 1))]
    with pytest.raises(DataError, match=r"has no spikes\.jsonl: no step of the run was a spike"):
        read_spikes(tmp_path / "elsewhere")


def test_a_loss_that_is_no_number_is_a_spike_and_names_who_has_it_first(tmp_path: Path) -> None:
    spikes = file(tmp_path)
    assert [spikes.median_if_spike(x) for x in (2.0, 2.0, 2.0, math.nan, 2.0)][3:] == [2.0, None]
    dearest = highest_first([4, 5, 6], [(9.0, 1.0), (math.nan, 2.0), (8.0, 1.0)])
    assert [one.sample for one in dearest] == [5, 4, 6]
    spikes.write(Spike(4, math.nan, 2.0, ("store",), dearest))
    (read,) = read_spikes(tmp_path)
    assert math.isnan(read.loss) and math.isnan(read.samples[0].loss)
    assert read.samples[1:] == dearest[1:]
