"""Several stores, a mixture and a curriculum: each step trains what the plan says."""

import numpy as np
import pytest

from megasft.draw import draw
from megasft.mixture import read_mixture
from megasft.packing.plan import plan_rows
from megasft.store_group import open_stores, population_of
from tests.megatron.conftest import BATCH, ROW_TOKENS, SEED, VOCAB, World
from tests.megatron.runs import scalars, train
from tests.stores import random_samples, write_store

pytestmark = pytest.mark.slow


def test_two_stores_train_stage_after_stage_with_the_losses_of_what_was_drawn(world: World) -> None:
    """At a learning rate of 0 every step is the turn mean over its own samples, copies counted.

    The audit runs, so units are compared at each step. Does not cover resuming; the plan's identity
    carries the draw, see ``tests/unit/training/test_resume.py``.
    """
    stores = [
        write_store(world.folder / name, random_samples(num, seed=seed, vocab=VOCAB)).path
        for name, num, seed in (("maths", 12, 1), ("chat", 30, 2))
    ]
    file = world.folder / "mixture.yaml"
    file.write_text(
        "curriculum: two-stage\nreplay: 0.25\nparts:\n"
        "  - {source: maths, sample_rate: 2.5, specialised: true}\n"
        "  - {source: chat, sample_rate: 0.8}\n"
    )
    group = open_stores(stores)
    drawn = draw(read_mixture(file), population_of(group), seed=SEED)
    plan = plan_rows(group, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED, draw=drawn)
    order = plan.order(seed=SEED)
    num_steps = -(-len(plan) // BATCH)
    assert plan.stages[1] > BATCH, "a whole step of the first stage"
    assert num_steps > 2
    flags = ("--megasft-data", *stores, "--megasft-mixture", file, "--lr", 0)
    more = ("--train-iters", num_steps, "--eval-interval", 1000, "--context-parallel-size", 2)

    output = train(2, [world.flags("mixed", *flags, *more)], world.folder / "w-mixture")

    assert "mixture: maths: 38 samples drawn of 12" in output  # 30, and 7.5 of them again
    logged = scalars(world.folder / "mixed")["lm loss"]
    seen = []
    for step in range(num_steps):
        rows = [plan.rows[order[k]] for k in range(step * BATCH, (step + 1) * BATCH)]
        samples = [group.sample(int(i)) for row in rows for i in row]
        expected = world.oracle("turn", samples=samples).loss
        assert logged[step + 1] == pytest.approx(expected, rel=1e-5), step
        seen.append({int(i) for row in rows for i in row})
    assert seen[0] <= set(range(12)), "the first step is of the specialised store alone"
    assert np.ptp(list(logged.values())) > 1e-3, "losses must tell steps apart"
