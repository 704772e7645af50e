"""``megasft resume-check`` on checkpoints as Megatron saves them, with its own flags and sampler.

All cases run in one process of their own (``resume_check_worker.py``); the checkpoint of a run that
was really trained and killed is checked in ``tests/megatron/test_resume.py``.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megasft.packing.plan import plan_rows
from megasft.store import open_store
from tests.stores import random_samples, write_store

from .conftest import Seen

pytestmark = pytest.mark.slow

ROW_TOKENS, SEED, NUM_ROWS = 96, 11, 62
ROOT = Path(__file__).resolve().parents[3]
MODEL = (
    *("--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4),
    *("--max-position-embeddings", 512, "--position-embedding-type", "rope"),
)
EIGHT = ("--train-iters", 12, "--global-batch-size", 8, "--micro-batch-size", 1)
GROWING = (
    *("--step-batch-size-schedule", f"0:4 {8 * ROW_TOKENS}:8 {24 * ROW_TOKENS}:16"),
    *("--train-samples", 96, "--micro-batch-size", 1),
)
KEEP_RATE = "--use-checkpoint-opt-param-scheduler"


class Case(NamedTuple):
    """A checkpoint, and how the command is asked about it.

    Attributes:
        flags: Of the run that saved it.
        ranks: Of that run.
        iteration: Steps it has done.
        consumed: Rows it has trained.
        given: To the command.
        defect: A name of ``resume_check_worker.DEFECTS``.
    """

    flags: tuple[object, ...] = EIGHT
    ranks: int = 2
    iteration: int = 3
    consumed: int = 24
    given: tuple[object, ...] = ()
    defect: str | None = None


MODEL_PARALLEL = (
    *("--world-size", 16, "--tensor-model-parallel-size", 2),
    *("--pipeline-model-parallel-size", 2, "--context-parallel-size", 2),
)
ON_FOUR = ("--world-size", 4)
IN_RAMP = Case(GROWING, 2, 3, 16)
DISTRIBUTED = Case((*EIGHT, "--use-distributed-optimizer"))

EXACT: dict[str, Case] = {
    "the same again": Case(),
    "more ranks": Case(given=("--world-size", 8)),
    "fewer ranks": Case(ranks=8, given=("--world-size", 1)),
    "micro-batch": Case(given=("--micro-batch-size", 4)),
    "TP, PP and CP": Case(ranks=4, given=MODEL_PARALLEL),
    "batch grown by half": Case(given=("--global-batch-size", 12, KEEP_RATE)),
    "smaller batch": Case(given=("--global-batch-size", 2, KEEP_RATE)),
    "batch of more than an epoch": Case(given=("--global-batch-size", 128, KEEP_RATE)),
    "batch changed before": Case(consumed=20, given=ON_FOUR),
    "second epoch": Case(iteration=9, consumed=72, given=ON_FOUR),
    "at the edge of an epoch": Case(
        (*EIGHT, "--global-batch-size", 2, "--train-iters", 99), 2, 31, 62, ("--world-size", 1)
    ),
    "at the start": Case(iteration=0, consumed=0, given=ON_FOUR),
    "in the ramp": IN_RAMP._replace(given=(*ON_FOUR, "--micro-batch-size", 2)),
    "before the ramp": Case(GROWING, 2, 1, 4, ON_FOUR),
    "after the ramp": Case(GROWING, 2, 5, 40, ("--world-size", 8)),
    "ramp replaced": IN_RAMP._replace(given=("--global-batch-size", 8)),
    "not balanced": Case((*EIGHT, "--megasft-no-balance"), given=ON_FOUR),
    "cost window": Case((*EIGHT, "--megasft-cost-window", 3), given=ON_FOUR),
    "packings": Case((*EIGHT, "--megasft-packings", 2), 2, 9, 72, ON_FOUR),
}
NEXT_SIZE = {
    "batch grown by half": 12,
    "smaller batch": 2,
    "at the edge of an epoch": 2,
    "before the ramp": 4,
    "after the ramp": 16,
}
"""Rows of the next step where they are not 8."""
WRONG: dict[str, Case] = {
    "a row late": Case(defect="a row late"),
    "two steps swapped": Case(defect="two steps swapped"),
}
REFUSED: dict[str, tuple[Case, str]] = {
    "seed": (
        Case(given=("--seed", 12)),
        r"trained on other rows \(checkpoint: seed 11, this run: seed 12\)",
    ),
    "packer": (
        Case(given=("--megasft-packer", "sequential")),
        "checkpoint: balanced, this run: sequential",
    ),
    "cost window": (
        Case(given=("--megasft-cost-window", 4)),
        "checkpoint: no cost window, this run: cost window 4 batches of 8 rows",
    ),
    "row length": (
        Case(given=("--seq-length", 192)),
        "checkpoint: row_tokens 96, this run: row_tokens 192",
    ),
    "learning rate": (
        Case(given=("--global-batch-size", 16)),
        "192 and checkpointvalue 96 .* --use-checkpoint-opt-param-scheduler keeps",
    ),
    "model": (
        Case(given=("--num-layers", 4)),
        r"num_layers value from checkpoint \(2\) is not equal to the input argument value \(4\)",
    ),
    "ranks": (
        Case(given=("--world-size", 3)),
        r"eval_global_batch_size \(8\) must be divisible by .*\(1\) \* data_parallel_size \(3\)",
    ),
    "ranks in the ramp": (
        IN_RAMP._replace(given=("--world-size", 3)),
        r"batch size \(8\) is not divisible by micro_batch_size \(1\) \* data_parallel_size \(3\)",
    ),
    "unknown flag": (Case(given=("--no-such-flag", 3)), "--no-such-flag 3 is no flag"),
    "no such flag to leave out": (Case(given=("--without", "sft-x")), "have no flag --sft-x"),
    "bad value": (
        Case(given=("--megasft-loss", "word")),
        "argument --megasft-loss: invalid choice: 'word'",
    ),
    "finetune": (Case(given=("--finetune",)), "set the position by hand"),
    "phases": (
        Case(given=("--phase-transition-iterations", 5)),
        "counts rows from 0 again behind a transition",
    ),
    "distributed optimizer": (
        DISTRIBUTED,
        "cannot load a checkpoint of --use-distributed-optimizer",
    ),
    "moments of another form": (
        DISTRIBUTED._replace(given=("--without", "use-distributed-optimizer")),
        "was saved with --use-distributed-optimizer, and without the flag",
    ),
}
CASES = (
    {f"exact: {name}": case for name, case in EXACT.items()}
    | {f"wrong: {name}": case for name, case in WRONG.items()}
    | {f"refused: {name}": case for name, (case, _) in REFUSED.items()}
)


class World:
    """A store, and what the command said in each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = write_store(folder / "store", random_samples(150, seed=5)).path
        cases = [self._as_json(place, case) for place, case in enumerate(CASES.values())]
        listing, results = folder / "cases.json", folder / "results.json"
        listing.write_text(json.dumps(cases))
        worker = (sys.executable, "-m", "tests.unit.cli.resume_check_worker")
        done = subprocess.run(
            [*worker, str(listing), str(results)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        seen = [Seen(**result) for result in json.loads(results.read_text())]
        self.seen = dict(zip(CASES, seen, strict=True))

    def _as_json(self, place: int, case: Case) -> dict[str, Any]:
        run = ("--megasft-data", self.store, "--calculate-per-token-loss", "--lr", 1e-3)
        rows = ("--seq-length", ROW_TOKENS, "--seed", SEED)
        checkpoint = str(self.folder / f"checkpoint{place}")
        save = {
            "folder": checkpoint,
            "flags": [str(flag) for flag in (*run, *rows, *MODEL, *case.flags)],
            "world_size": case.ranks,
            "iteration": case.iteration,
            "consumed": case.consumed,
        }
        check = [checkpoint, *map(str, case.given)]
        return {"save": save, "check": check, "defect": case.defect}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("resume"))


def counts(out: str) -> dict[str, int]:
    """Return the counts of rows: before, to come, repeated, skipped."""
    found = re.search(
        r"([\d,]+) rows trained before, ([\d,]+) still to come, (\d+) repeated, (\d+) skipped", out
    )
    assert found, out
    numbers = [int(number.replace(",", "")) for number in found.groups()]
    return dict(zip(("before", "to come", "repeated", "skipped"), numbers, strict=True))


def next_rows(out: str) -> list[int]:
    """Return the rows of the next step, of all ranks shown."""
    lines = re.findall(r"data-parallel rank \d+: rows ([\d, ]+)", out)
    return [int(row) for line in lines for row in line.strip(", ").split(",")]


@pytest.mark.parametrize("name", EXACT)
def test_each_row_is_trained_once_on_any_layout_and_the_next_step_is_the_plans(
    world: World, name: str
) -> None:
    seen, consumed = world.seen[f"exact: {name}"], EXACT[name].consumed
    assert seen.code == 0, seen.err
    num = counts(seen.out)
    assert num["repeated"] == num["skipped"] == 0
    assert "each row is trained exactly once an epoch" in seen.out
    if name in ("packings", "cost window"):
        return  # their orders are tested in tests/unit/packing
    plan = plan_rows(open_store(world.store), row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
    assert len(plan) == NUM_ROWS
    epochs = 2 if consumed == NUM_ROWS else 1
    assert num["before"] + num["to come"] == epochs * NUM_ROWS
    assert num["before"] == (consumed if epochs == 2 else consumed % NUM_ROWS)
    rows, order = next_rows(seen.out), plan.order(seed=SEED)
    assert f"made.jsonl:{plan.rows[rows[0]][0] + 1}" in seen.out
    if name != "batch of more than an epoch":  # printed in part
        assert len(rows) == NEXT_SIZE.get(name, 8)
        assert sorted(rows) == sorted(order[k] for k in range(consumed, consumed + len(rows)))


def test_rows_of_steps_that_cannot_be_replayed_are_told(world: World) -> None:
    told = "rows before were trained by steps of another batch size"
    assert f"\n4 {told}" in world.seen["exact: batch changed before"].out
    assert told not in world.seen["exact: in the ramp"].out


def test_both_layouts_and_changed_flags_stand_side_by_side(world: World) -> None:
    out = world.seen["exact: TP, PP and CP"].out
    for line in ("ranks +4 +16", "data parallel +4 +2", "tensor parallel +1 +2"):
        assert re.search(line, out), line
    assert re.search("--context-parallel-size +1 +2", out)
    assert re.search("global batch +8 +12", world.seen["exact: batch grown by half"].out)
    ramp = world.seen["exact: ramp replaced"].out
    assert re.search(r"--step-batch-size-schedule +0:4 768:8 2304:16 +\(none\)", ramp)


def test_a_row_trained_late_is_counted_as_skipped_and_its_step_is_named(world: World) -> None:
    seen = world.seen["wrong: a row late"]
    assert seen.code == 1
    assert counts(seen.out)["skipped"] == 1
    assert "the step from row 24 on trains rows that are not its own" in seen.out


def test_a_row_trained_in_the_wrong_step_is_found_though_each_is_trained_once(world: World) -> None:
    seen = world.seen["wrong: two steps swapped"]
    num = counts(seen.out)
    assert (seen.code, num["repeated"], num["skipped"]) == (1, 0, 0)
    assert "the step from row 24 on trains rows that are not its own" in seen.out


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_resume_is_refused_and_the_difference_named(world: World, name: str) -> None:
    seen, message = world.seen[f"refused: {name}"], REFUSED[name][1]
    assert seen.code == 1
    assert re.search(message, seen.err), seen.err
