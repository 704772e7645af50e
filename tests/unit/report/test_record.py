import math
from dataclasses import replace

import pytest

from megasft.loss.breakdown import CATEGORIES, COLUMNS, LENGTHS, POSITIONS, WHOLE
from megasft.report.record import (
    LENGTH_NAMES,
    POSITION_NAMES,
    Means,
    as_json,
    losses_of,
    scalars,
)

from .records import LOSSES, STEP, VALIDATION

NAMES = ("", "maths", "talk")


def table(**sums_of_row: float) -> list[list[float]]:
    """Slots whose whole and whose second category hold these sums, and that of no category.

    Another set has a category more.
    """
    rows = [[0.0] * len(COLUMNS) for _ in range(CATEGORIES.start + len(NAMES) + 1)]
    sums = [sums_of_row[name] for name in COLUMNS]
    rows[WHOLE] = rows[CATEGORIES.start] = rows[CATEGORIES.start + 2] = sums
    rows[POSITIONS.start] = rows[LENGTHS.start + 1] = sums
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
    plain = losses_of(table(**SUMS), NAMES, objective=objective, dft_alpha=0.0)
    half = losses_of(table(**SUMS), NAMES, objective=objective, dft_alpha=0.5)
    assert plain is not None and half is not None
    assert (plain.token_loss, plain.turn_loss, plain.sample_loss) == (1.5, 1.25, 1.5)
    assert (plain.loss, plain.dft_loss) == (mean, full_dft)
    assert half.loss == half.dft_loss == 0.5 * full_dft + 0.5 * mean
    assert plain.p_correct == 0.25
    assert (plain.labels, plain.turns, plain.samples) == (40, 4, 2)


def test_what_has_no_label_is_left_out_and_nothing_is_nan() -> None:
    losses = losses_of(table(**SUMS), NAMES, objective="turn", dft_alpha=0.0)
    assert losses is not None
    means = Means(loss=1.5, turn_loss=1.25, p_correct=0.25, labels=40, turns=4)
    assert losses.categories == {"talk": means}
    assert losses.turn_positions == {"1": means} and losses.turn_lengths == {"16-63": means}
    nothing = table(**dict.fromkeys(COLUMNS, 0.0))
    assert losses_of(nothing, NAMES, objective="turn", dft_alpha=0.0) is None

    empty = replace(STEP, losses=None)
    line = as_json(empty)
    assert line["loss"] is None and "labels" not in line and "categories" in line
    assert "train/loss" not in scalars(empty) and "train/grad_norm" in scalars(empty)
    assert all(math.isfinite(value) for value in scalars(STEP).values())


def test_a_line_has_the_keys_opensft_prints() -> None:
    line = as_json(STEP)
    assert list(line)[:4] == ["epoch", "steps", "lr", "maths_loss"]
    assert (line["epoch"], line["steps"], line["lr"], line["loss"]) == (0.4, 2, 1e-05, 1.25)
    assert (line["maths_loss"], line["stem_zh/phy_loss"]) == (1.0, 2.5)


def test_a_line_holds_every_number_under_its_name() -> None:
    known = replace(STEP, speed=STEP.speed._replace(mfu=0.416))
    of_step = {"epoch": 0.4, "steps": 2, "lr": 1e-05, "grad_norm": 0.75, "padding": 0.03125}
    losses = {"loss": 1.25, "token_loss": 1.5, "sample_loss": 1.375, "turn_loss": 1.125}
    losses |= {"dft_loss": 0.25, "avg_p_correct": 0.375, "perplexity": math.exp(1.5)}
    losses |= {"maths_loss": 1.0, "stem_zh/phy_loss": 2.5}
    counts = {"labels": 1200, "turns": 40, "samples": 30}
    machine = {"seconds": 0.2, "tokens_per_second": 2000.0, "labels_per_second": 600.0}
    machine |= {"tflops": 3.5, "mfu": 0.416, "memory_gib": 2.5, "skipped": False, "time": 1000.0}
    groups = {
        "categories": {
            "maths": Means(1.0, 0.75, 0.5, 800, 30)._asdict(),
            "stem_zh/phy": Means(2.5, 2.0, 0.25, 400, 10)._asdict(),
        },
        "turn_positions": {"1": Means(1.75, 1.625, 0.625, 700, 28)._asdict()},
        "turn_lengths": {"16-63": Means(1.875, 1.0625, 0.875, 900, 35)._asdict()},
    }
    assert as_json(known) == of_step | losses | counts | machine | groups


def test_a_category_called_as_a_mean_does_not_replace_it() -> None:
    named = replace(LOSSES, categories={"turn": LOSSES.categories["stem_zh/phy"]})
    line = as_json(replace(STEP, losses=named))
    assert line["turn_loss"] == 1.125 and line["categories"]["turn"]["loss"] == 2.5
    found = scalars(replace(STEP, losses=named))
    assert found["train/turn_loss"] == 1.125 and found["category/turn"] == 2.5


def test_scalars_have_a_tag_for_each_number_and_each_category_once() -> None:
    found = scalars(STEP)
    assert found["train/loss"] == 1.25 and found["category/maths"] == 1.0
    assert (found["turn/1"], found["turn_length/16-63"]) == (1.75, 1.875)
    assert not [tag for tag in found if tag.startswith("train/maths") or tag == "train/steps"]
    assert scalars(VALIDATION) == {
        "eval/talk/loss": 1.25,
        "eval/talk/token_loss": 1.5,
        "eval/talk/sample_loss": 1.375,
        "eval/talk/turn_loss": 1.125,
        "eval/talk/dft_loss": 0.25,
        "eval/talk/avg_p_correct": 0.375,
        "eval/talk/perplexity": math.exp(1.5),
        "eval/talk/labels": 1200,
        "eval/talk/turns": 40,
        "eval/talk/samples": 30,
        "eval/talk/category/maths": 1.0,
        "eval/talk/category/stem_zh/phy": 2.5,
        "eval/talk/turn/1": 1.75,
        "eval/talk/turn_length/16-63": 1.875,
    }
