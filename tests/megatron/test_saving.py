"""Signals, failed saves, retention, the best checkpoint and frozen parameters, in the real loop.

One start of two ranks runs them all, one after the other.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.megatron.conftest import World
from tests.megatron.runs import scalars, torchrun

pytestmark = pytest.mark.slow

STEPS = 6
MANY = 15
KEPT_STEPS = 4
TRACKER = "latest_checkpointed_iteration.txt"
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform")
FROZEN = ("--megasft-freeze", "embedding", "mlp", "--train-iters", 3)


class Outcomes(NamedTuple):
    """What became of each run, by its name: exit code and error of both ranks."""

    folder: Path
    of: dict[str, list[dict[str, Any]]]
    processes: dict[str, list[int]]
    complete: dict[str, bool]
    changed: dict[str, list[str]]
    output: str


@pytest.fixture(scope="module")
def outcomes(world: World) -> Outcomes:
    folder = world.folder / "saving"
    folder.mkdir()
    steady = ("--lr-decay-style", "constant", "--eval-interval", 1000, "--train-iters", STEPS)
    runs: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {}

    def add(
        name: str, *flags: object, event: str | None = None, ranks: tuple[int, ...] = ()
    ) -> None:
        what = {"event": event, "ranks": ranks, "step": 3}
        runs[name] = (what, (*steady, *flags))

    def saves(name: str, every: int) -> tuple[object, ...]:
        place = folder / name
        return ("--save", place, "--load", place, "--save-interval", every)

    add("straight")
    add("told", *saves("told", 100), event="usr1", ranks=(1,))
    add("told-resumed", *saves("told", 100))
    add("full", *saves("full", 2), event="disk-full", ranks=(0, 1))
    add("full-resumed", *saves("full", 2))
    best = ("--megasft-best", "--eval-interval", 1, "--lr", 0.3, "--megasft-early-stop", 2)
    best = (*best, "--train-iters", MANY)
    best = (*best, *saves("best", 100), "--megasft-keep-last", 1)
    add("best", *best)
    add("best-again", *best)
    kept = (*saves("kept", 3), "--megasft-epochs", 0.5, "--megasft-keep-last", 2)
    kept = (*kept, "--megasft-best", "--eval-interval", 2)
    add("kept", *kept)
    add("kept-again", *kept)
    add("kept-unmarked", *kept, event="unmark")
    add("kept-longer", *kept, "--megasft-epochs", 0.7)
    add("frozen", *saves("frozen", 3), *FROZEN)
    partly = ("--megasft-freeze", r"layers\.0\.")
    add("partly", *saves("partly", 3), *partly)
    add("partly-unsaved", *saves("partly", 3), *partly, "--no-save-optim", "--train-iters", 2)
    add("frozen-recomputed", *FROZEN, *RECOMPUTE, "--recompute-num-layers", 1)

    listing = folder / "runs.json"
    entries = [
        what | {"flags": without_length(world.flags(name, *flags))}
        for name, (what, flags) in runs.items()
    ]
    listing.write_text(json.dumps(entries))
    output = torchrun(2, "-m", "tests.megatron.saving_worker", str(listing))
    read = lambda i, rank: json.loads((folder / f"{i}-{rank}.json").read_text())  # noqa: E731
    of = {name: [read(i, rank) for rank in (0, 1)] for i, name in enumerate(runs)}
    processes = {name: [rank.pop("processes") for rank in ranks] for name, ranks in of.items()}
    complete, changed = (
        {name: of[name][0].pop(fact) for name in of} for fact in ("is_complete", "changed")
    )
    return Outcomes(folder, of, processes, complete, changed, output)


def without_length(flags: list[str]) -> list[str]:
    """Drop --train-iters where --megasft-epochs says how long a run is."""
    if "--megasft-epochs" not in flags:
        return flags
    at = [i for i, flag in enumerate(flags) if flag == "--train-iters"]
    return [flag for i, flag in enumerate(flags) if not {i, i - 1} & set(at)]


def losses(world: World, name: str) -> dict[int, float]:
    return scalars(world.folder / name).get("lm loss", {})


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and "optimizer" not in name
    }
    load(weights, storage_reader=reader, no_dist=True)
    return weights


def iterations(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("iter_")) for p in folder.glob("iter_*"))


def test_a_signal_on_one_rank_saves_on_all_and_exits_with_0(
    world: World, outcomes: Outcomes
) -> None:
    """Mirrors ``checkpoint_and_decide_exit`` (megatron-core 0.19.2) with SIGUSR1 on rank 1."""
    assert outcomes.of["told"] == [{"exit": 0, "error": None}] * 2
    assert outcomes.complete["told"] is False
    assert outcomes.complete["told-resumed"] is True
    assert iterations(outcomes.folder / "told") == [3, STEPS]
    straight = losses(world, "straight")
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert sorted(losses(world, "told")) == [1, 2, 3]
    assert losses(world, "told") | losses(world, "told-resumed") == pytest.approx(
        straight, rel=2e-5
    )


def test_saving_starts_no_process(outcomes: Outcomes) -> None:
    """Megatron would start one on each rank, which imports torch and the program again."""
    assert outcomes.processes == {name: [0, 0] for name in outcomes.of}
    assert iterations(outcomes.folder / "frozen") == [3]


def test_a_save_that_fails_leaves_the_last_checkpoint_and_says_so(
    world: World, outcomes: Outcomes
) -> None:
    """The disk is full from step 3 on; step 2 was saved, and step 4 cannot be."""
    (error, _) = outcomes.of["full"]
    assert not outcomes.complete["full"]
    assert str(error["error"]).startswith("SaveError: saving step 4 to ")
    assert "step 2 is whole, and the same command with --load" in error["error"]
    assert "GiB are free there" in error["error"]
    assert sorted(losses(world, "full-resumed")) == [3, 4, 5, 6]
    assert int((outcomes.folder / "full" / TRACKER).read_text()) == STEPS


def test_the_best_is_saved_and_kept_and_the_run_ends_when_it_gets_no_better(
    outcomes: Outcomes,
) -> None:
    """The learning rate is far too high, so the first evaluations are the best."""
    folder = outcomes.folder / "best"
    best = json.loads((folder / "best.json").read_text())
    last = best["iteration"] + 2
    assert best["evaluations_since"] == 2
    assert last < MANY, "the run must have ended early for this test to say anything"
    assert outcomes.of["best"] == [{"exit": 0, "error": None}] * 2
    assert outcomes.complete["best"], "a run that gets no better is complete"
    assert iterations(folder) == [best["iteration"], last]
    assert "evaluations since step" in outcomes.output


def test_a_finished_run_begun_again_changes_nothing(outcomes: Outcomes) -> None:
    """Neither one that had all its steps, nor one that its early stop ended.

    As a scheduler does that puts a job into the queue again. Steps were trained and saved by the
    run before, so a mistake would delete its best checkpoint, or empty its log. Where the mark of
    a complete run is missing, as after a kill at the very end, the last evaluation is made again,
    and the mark is all that is written.
    """
    for name in ("best-again", "kept-again"):
        assert outcomes.of[name] == [{"exit": None, "error": None}] * 2, name
        assert outcomes.changed[name] == [], name
        assert outcomes.complete[name], name
    assert outcomes.output.count("the run is complete: ") == 2
    assert outcomes.changed["kept-unmarked"] == [
        ".writer.json",
        "complete.json",
        "log/.writer.json",
    ]
    assert f"validation loss at iteration {KEPT_STEPS} on validation set" in outcomes.output


def test_older_checkpoints_go_and_epochs_say_how_long_a_run_is(outcomes: Outcomes) -> None:
    """Half an epoch of 62 rows is 4 iterations of 8; a longer run goes on from there."""
    assert f"0.5 epochs of 62 rows are {KEPT_STEPS} iterations of 8" in outcomes.output
    folder = outcomes.folder / "kept"
    best = json.loads((folder / "best.json").read_text())
    assert [step for step, _ in best["evaluations"]] == [2, 4, 6], "each step is evaluated once"
    assert iterations(folder) == sorted({best["iteration"], 4, 6})
    lines = [json.loads(line) for line in (folder / "log" / "steps.jsonl").read_text().splitlines()]
    assert [x["steps"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["steps"] for x in lines if "validation" in x] == [2, 4, 6]
    assert not list(folder.glob(".deleted*"))
    assert outcomes.complete["kept-longer"]


def test_frozen_parameters_stay_and_the_others_learn(world: World, outcomes: Outcomes) -> None:
    """Also behind a frozen embedding under full recomputation, where Megatron would lose them."""
    start = weights_in(world.folder / "megatron" / "release")
    trained = weights_in(outcomes.folder / "frozen" / "iter_0000003")
    weights = sorted(start.keys() & trained.keys())
    same = {n for n in weights if torch.equal(start[n], trained[n])}
    assert same == {n for n in weights if "embedding" in n or "mlp" in n}
    assert 2 < len(same) < len(weights) - 2
    assert "trains 22 of its 35 parameter tensors" in outcomes.output
    recomputed = losses(world, "frozen-recomputed")
    assert recomputed == pytest.approx(losses(world, "frozen"), rel=1e-6)
    assert recomputed != pytest.approx(losses(world, "straight"), rel=1e-4)


def test_moments_of_some_layers_are_refused_where_they_would_be_saved(
    world: World, outcomes: Outcomes
) -> None:
    """Megatron stacks layers in checkpoints (``ShardedTensor.prepend_axis_num``, 0.19.2)."""
    for outcome in outcomes.of["partly"]:
        assert "is frozen in some layers only" in outcome["error"]
        assert "add --no-save-optim" in outcome["error"]
    assert sorted(losses(world, "partly-unsaved")) == [1, 2]
