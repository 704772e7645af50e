import math
from dataclasses import replace

import pytest

from megasft.loss.breakdown import COLUMNS, slots_of_sets
from megasft.report.record import LENGTH_NAMES, POSITION_NAMES, as_json, losses_of, scalars

from .records import LOSSES, STEP, VALIDATION

(SLOTS,) = slots_of_sets([[3, 5]])
NAMES = {3: "maths", 5: "talk"}


def table(**sums_of_row: float) -> list[list[float]]:
    """A table whose whole and whose category 5 hold these sums, and nothing else."""
    rows = [[0.0] * len(COLUMNS) for _ in range(SLOTS.lengths.stop)]
    sums = [sums_of_row[name] for name in COLUMNS]
    rows[SLOTS.whole] = rows[SLOTS.categories.start + 2] = sums
    rows[SLOTS.positions.start] = rows[SLOTS.lengths.start + 1] = sums
    return rows


SUMS = {
    "labels": 40.0,
    "turns": 4.0,
    "samples": 2.0,
    "ce": 60.0,
    "ce_per_turn": 5.0,
    "ce_per_sample": 3.0,
    "p": 10.0,
    "weighted_p_ce": 1.0,
}


def test_names_of_positions_and_lengths_read_as_what_they_hold() -> None:
    assert POSITION_NAMES == ("1", "2", "3", "4", "5", "6", "7", "8+")
    assert LENGTH_NAMES[:2] == ("1-15", "16-63") and LENGTH_NAMES[-1] == "16384+"


@pytest.mark.parametrize(
    ("objective", "mean", "full_dft"),
    [("token", 1.5, 1 / 40), ("turn", 1.25, 1 / 4), ("sample", 1.5, 1 / 2)],
)
def test_every_mean_is_a_sum_over_a_count(objective: str, mean: float, full_dft: float) -> None:
    plain = losses_of(table(**SUMS), SLOTS, objective=objective, dft_alpha=0.0, names=NAMES)
    half = losses_of(table(**SUMS), SLOTS, objective=objective, dft_alpha=0.5, names=NAMES)
    assert plain is not None and half is not None
    assert (plain.token_loss, plain.turn_loss, plain.sample_loss) == (1.5, 1.25, 1.5)
    assert (plain.loss, plain.dft_loss) == (mean, full_dft)
    assert half.loss == half.dft_loss == 0.5 * full_dft + 0.5 * mean
    assert plain.p_correct == 0.25
    assert (plain.labels, plain.turns, plain.samples) == (40, 4, 2)


def test_what_has_no_label_is_left_out_and_nothing_is_nan() -> None:
    losses = losses_of(table(**SUMS), SLOTS, objective="turn", dft_alpha=0.0, names=NAMES)
    assert losses is not None
    assert list(losses.categories) == ["talk"]
    assert list(losses.turn_positions) == ["1"] and list(losses.turn_lengths) == ["16-63"]
    nothing = table(**dict.fromkeys(COLUMNS, 0.0))
    assert losses_of(nothing, SLOTS, objective="turn", dft_alpha=0.0, names=NAMES) is None

    empty = replace(STEP, losses=None)
    line = as_json(empty)
    assert line["loss"] is None and "labels" not in line and "categories" in line
    assert "train/loss" not in scalars(empty) and "train/grad_norm" in scalars(empty)
    assert all(math.isfinite(value) for value in scalars(STEP).values())


def test_a_line_has_the_keys_opensft_prints() -> None:
    line = as_json(STEP)
    assert list(line)[:4] == ["epoch", "steps", "lr", "maths_loss"]
    assert (line["epoch"], line["steps"], line["lr"], line["loss"]) == (0.5, 2, 1e-05, 1.25)
    assert (line["maths_loss"], line["stem_zh/phy_loss"]) == (1.0, 2.5)


def test_a_category_called_as_a_mean_does_not_replace_it() -> None:
    named = replace(LOSSES, categories={"turn": LOSSES.categories["stem_zh/phy"]})
    line = as_json(replace(STEP, losses=named))
    assert line["turn_loss"] == 1.25 and line["categories"]["turn"]["loss"] == 2.5
    found = scalars(replace(STEP, losses=named))
    assert found["train/turn_loss"] == 1.25 and found["category/turn"] == 2.5


def test_scalars_have_a_tag_for_each_number_and_each_category_once() -> None:
    found = scalars(STEP)
    assert found["train/loss"] == 1.25 and found["category/maths"] == 1.0
    assert found["turn/1"] == found["turn_length/16-63"] == 1.5
    assert not [tag for tag in found if tag.startswith("train/maths") or tag == "train/steps"]
    assert scalars(VALIDATION) == {
        "eval/talk/loss": 1.25,
        "eval/talk/token_loss": 1.5,
        "eval/talk/sample_loss": 1.375,
        "eval/talk/turn_loss": 1.25,
        "eval/talk/dft_loss": 0.25,
        "eval/talk/avg_p_correct": 0.375,
        "eval/talk/perplexity": math.exp(1.5),
        "eval/talk/labels": 1200,
        "eval/talk/turns": 40,
        "eval/talk/samples": 30,
        "eval/talk/category/maths": 1.0,
        "eval/talk/category/stem_zh/phy": 2.5,
        "eval/talk/turn/1": 1.5,
        "eval/talk/turn_length/16-63": 1.5,
    }
