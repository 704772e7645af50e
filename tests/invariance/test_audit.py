"""The audit stops a run on the very step on which a rank counts wrong."""

import json

import pytest

from megasft.megatron.global_batch import GlobalBatches
from megasft.proof.world import OBJECTIVES, SEED, World
from megasft.ranks.layout import Layout
from tests.invariance.runs import run_all
from tests.megatron.runs import torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("extra", [(), ("--megasft-no-audit",)], ids=["audited", "not audited"])
def test_a_wrong_count_stops_the_run_on_the_step_it_happens(
    qwen3: World, extra: tuple[str, ...]
) -> None:
    """One unit too many, on one of two ranks, in step 3 of 4; two micro-batches count 2 more.

    Mirrors ``finalize_model_grads`` of megatron-core 0.19.2, whose reduced count is what is read.
    """
    result = qwen3.folder / "miscount.json"
    run = qwen3.flags(Layout(2, mbs=2), OBJECTIVES["turn"])
    flags = [*run, "--train-iters", "4", *extra]
    torchrun(2, "-m", "tests.invariance.miscount_worker", "3", str(result), *flags)

    outcome = json.loads(result.read_text())
    if extra:
        assert outcome == {"trained": 4, "message": ""}
        return
    assert outcome["trained"] == 2, "steps 1 and 2 are trained, step 3 is not"
    batches = GlobalBatches(qwen3.plan, seed=SEED, objective="turn")
    third = batches.at(2 * qwen3.batch, num_rows=qwen3.batch)
    message = outcome["message"]
    assert "step 3" in message
    assert f"reduced {third.units + 2:,} turns" in message and f"hold {third.units:,}" in message
    assert f"rows {', '.join(map(str, third.rows))} of the plan" in message


def test_the_audit_catches_turns_counted_on_every_share(qwen3: World) -> None:
    """The defect `megasft prove --break double-count` shows by its effect, caught by its cause."""
    runs = [qwen3.flags(Layout(2, cp=2), OBJECTIVES["turn"])]
    (why,) = run_all(2, runs, qwen3.folder / "double", defect="double-count").values()

    assert why.startswith("step 1: Megatron reduced")
