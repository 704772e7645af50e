"""What a run does with weights of turns: factors of batches and evaluations, and the flag."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megasft.draw import Draw, Stage
from megasft.errors import FlagError
from megasft.megatron.global_batch import GlobalBatches
from megasft.packing.plan import RowPlan, plan_rows
from megasft.proof.samples import weighted
from megasft.schema import Sample, turn_weights_of
from megasft.store import TokenStore
from megasft.training import turn_weights
from tests.stores import random_samples, sample, write_store

SAMPLES = [*weighted(random_samples(40, seed=3), seed=4), sample([1, 2, 3])]
OBJECTIVES = ("turn", "sample", "token")


def scale_by_hand(samples: list[Sample], objective: str) -> float:
    """Units over the sum of their weights, one unit after the other."""
    weights: list[float] = []
    for one in samples:
        turns = list(
            zip(turn_weights_of(one.turns).tolist(), one.turns[:, 1].tolist(), strict=True)
        )
        of_labels = [weight for weight, size in turns for _ in range(size)]
        if objective == "turn":
            weights += [weight for weight, _ in turns]
        elif objective == "token":
            weights += of_labels
        elif of_labels:
            weights.append(sum(of_labels) / len(of_labels))
    return len(weights) / sum(weights) if weights else 1.0


def plan_of(path: Path, samples: list[Sample], draw: Draw | None = None) -> RowPlan:
    store = write_store(path, samples)
    return plan_rows(store, row_tokens=64, align_tokens=8, seed=1, draw=draw)


def inside(plan: RowPlan, rows: tuple[int, ...], samples: list[Sample]) -> list[Sample]:
    return [samples[i] for row in rows for i in plan.rows[row]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_factor_is_that_of_the_whole_global_batch(tmp_path: Path, objective: str) -> None:
    """Also of one that straddles the edge of an epoch, and of batches of any size."""
    plan = plan_of(tmp_path / "store", SAMPLES)
    batches = GlobalBatches(plan, seed=9, objective=objective, normalizes=True)

    found = set()
    for position, size in ((0, 8), (8, 2), (len(plan) - 2, 5), (0, len(plan)), (3, 1)):
        batch = batches.at(position, num_rows=size)
        wanted = scale_by_hand(inside(plan, batch.rows, SAMPLES), objective)
        assert batch.weight_scale == pytest.approx(wanted, rel=1e-12)
        found.add(round(batch.weight_scale, 6))

    assert len(found) == 5, "batches must differ, or the factor of any of them would do"
    whole = batches.at(0, num_rows=8)
    rows = [batches.at(k, num_rows=1) for k in range(8)]
    means = [row.weight_scale for row in rows if row.units]
    assert abs(np.mean(means) - whole.weight_scale) > 1e-2, "the mean of micro-batches is another"
    used = GlobalBatches(plan, seed=9, objective=objective).at(0, num_rows=8)
    assert used == whole._replace(weight_scale=1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_that_a_mixture_draws_twice_weighs_twice(tmp_path: Path, objective: str) -> None:
    drawn = Draw("mixed", (Stage("all", np.array([3, 3, 5, 40, 3, 7])),), (), ())
    plan = plan_of(tmp_path / "store", SAMPLES, drawn)

    batches = GlobalBatches(plan, seed=0, objective=objective, normalizes=True)

    wanted = scale_by_hand([SAMPLES[i] for i in (3, 3, 5, 3, 7)], objective)
    assert batches.at(0, num_rows=len(plan)).weight_scale == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_a_label_and_one_of_ones_have_the_factor_1(
    tmp_path: Path, objective: str
) -> None:
    for n, samples in enumerate(([sample([1, 2])] * 40, random_samples(30, seed=1))):
        plan = plan_of(tmp_path / str(n), samples)
        batches = GlobalBatches(plan, seed=0, objective=objective, normalizes=True)
        assert batches.at(0, num_rows=2).weight_scale == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_evaluation_is_normalized_over_whole_stores(tmp_path: Path, objective: str) -> None:
    sets = [SAMPLES[:9], SAMPLES[9:], random_samples(5, seed=8), [sample([1, 2])]]
    plans = [plan_of(tmp_path / str(n), one) for n, one in enumerate(sets)]

    scales = turn_weights.evaluation_scales(flags("normalize", objective), plans)

    wanted = [scale_by_hand(one, objective) for one in sets]
    assert scales.each == pytest.approx(wanted, rel=1e-12)
    assert wanted[2:] == [1.0, 1.0] and abs(wanted[0] - wanted[1]) > 1e-3
    together = scale_by_hand([one for samples in sets for one in samples], objective)
    assert scales.together == pytest.approx(together, rel=1e-12)
    for other in ("use", "ignore"):
        assert turn_weights.evaluation_scales(flags(other, objective), plans) == (1.0, (1.0,) * 4)


def flags(what: str, objective: str = "turn") -> Any:
    return SimpleNamespace(megasft_turn_weights=what, megasft_loss=objective)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TokenStore]:
    plain = write_store(tmp_path / "plain", random_samples(4, seed=1))
    return {"train": write_store(tmp_path / "weighted", SAMPLES), "validation": plain}


@pytest.mark.parametrize("what", ["normalize", "ignore"])
def test_a_flag_without_effect_is_refused(stores: dict[str, TokenStore], what: str) -> None:
    plain = turn_weights.as_asked(flags(what), stores["validation"])
    with pytest.raises(FlagError, match=rf"{what} has no effect: every turn of .*plain has a"):
        turn_weights.require_effect(flags(what), [plain])
    turn_weights.require_effect(flags(what), [plain, stores["train"]])
    turn_weights.require_effect(flags("use"), [plain])


def test_ignored_weights_are_read_as_1_and_still_named(stores: dict[str, TokenStore]) -> None:
    read = turn_weights.as_asked(flags("ignore"), stores["train"])
    assert (turn_weights_of(read.samples(np.arange(40)).turns) == 1).all()
    turn_weights.require_effect(flags("ignore"), [read])
    plan = plan_rows(read, row_tokens=64, align_tokens=8, seed=1)
    assert all((plan.unit_weights[name] == plan.units[name]).all() for name in OBJECTIVES)
    assert turn_weights.as_asked(flags("use"), stores["train"]) is stores["train"]


@pytest.mark.parametrize(
    ("what", "effect"),
    [
        ("use", "each multiplies the loss of its turn"),
        ("normalize", "and the loss is divided by their mean"),
        ("ignore", "every turn is trained with a weight of 1"),
    ],
)
def test_the_log_says_in_a_line_which_stores_have_weights_and_what_they_do(
    stores: dict[str, TokenStore], caplog: pytest.LogCaptureFixture, what: str, effect: str
) -> None:
    with caplog.at_level(logging.INFO, "megasft"):
        turn_weights.announce(flags(what), stores)

    (line,) = caplog.messages
    weights = np.concatenate([turn_weights_of(one.turns) for one in SAMPLES])
    assert line.startswith(f"train: {int((weights != 1).sum())} turns have a weight other than 1")
    assert f"from {weights.min():.6g} to {weights.max():.6g}" in line and effect in line
    assert line.endswith(f"(--megasft-turn-weights {what})")
