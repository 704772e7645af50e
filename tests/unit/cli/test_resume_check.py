"""``megasft resume-check`` on checkpoints as Megatron saves them, without their tensors.

That the rows it names are those that ranks train is tested in ``tests/megatron/test_resume.py``.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from megasft.megatron import cpu
from megasft.packing.cost_window import CostWindow
from megasft.packing.plan import plan_rows
from megasft.store import open_store
from tests.stores import random_samples, write_store
from tests.unit.cli.conftest import Seen
from tests.unit.saved_run import save_run

pytestmark = pytest.mark.slow  # imports the real Megatron

Command = Callable[..., Seen]

ROW_TOKENS, SEED, NUM_ROWS = 96, 11, 62
MODEL = (
    *("--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4),
    *("--max-position-embeddings", 512, "--position-embedding-type", "rope"),
)
EIGHT = ("--train-iters", 12, "--global-batch-size", 8)
GROWING = (
    *("--step-batch-size-schedule", f"0:4 {8 * ROW_TOKENS}:8 {24 * ROW_TOKENS}:16"),
    *("--train-samples", 96),
)
KEEP_RATE = "--use-checkpoint-opt-param-scheduler"


class Saved(NamedTuple):
    """A run that has saved: its flags, ranks, steps and rows done."""

    flags: tuple[object, ...] = EIGHT
    ranks: int = 2
    iteration: int = 3
    consumed: int = 24


SAVED = {
    "plain": Saved(),
    "second epoch": Saved(iteration=9, consumed=72),
    "epoch's end": Saved(
        ("--global-batch-size", 2, "--train-iters", 99), iteration=31, consumed=62
    ),
    "growing": Saved(GROWING, 2, 3, 16),
    "cost window": Saved((*EIGHT, "--megasft-cost-window", 3)),
    "packings": Saved((*EIGHT, "--megasft-packings", 2), iteration=9, consumed=72),
    "distributed": Saved((*EIGHT, "--use-distributed-optimizer")),
}
LAYOUT = (
    *("--world-size", 16, "--tensor-model-parallel-size", 2),
    *("--pipeline-model-parallel-size", 2, "--context-parallel-size", 2),
)


@pytest.fixture(scope="module", autouse=True)
def remember_docstrings() -> Iterator[None]:
    """Make parsers in a third of the time; other tests see Megatron as it is."""
    cpu.prepare()
    from megatron.training.argument_utils import ArgumentGroupFactory

    original = ArgumentGroupFactory._get_field_docstrings
    cpu.remember_docstrings()
    yield
    ArgumentGroupFactory._get_field_docstrings = original


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("resume")
    store = write_store(folder / "store", random_samples(150, seed=5)).path
    data = ("--megasft-data", store, "--calculate-per-token-loss", "--lr", 1e-3)
    rows = ("--seq-length", ROW_TOKENS, "--seed", SEED, "--micro-batch-size", 1)
    runs = {}
    for name, (flags, ranks, iteration, consumed) in SAVED.items():
        run = (*data, *rows, *MODEL, *flags)
        place = folder / name.replace(" ", "-")
        runs[name] = save_run(place, run, ranks=ranks, iteration=iteration, consumed=consumed)
    return SimpleNamespace(store=store, flags=(*data, *rows, *MODEL, *EIGHT), runs=runs)


@pytest.fixture(autouse=True)
def keep_loggers() -> Iterator[None]:
    logger = logging.getLogger("megasft")
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


def next_rows(out: str) -> list[int]:
    found = re.search(r"iteration ([\d,]+) trains ([\d,]+) rows: ([\d, ]+)", out)
    assert found, out
    return [int(row) for row in found[3].split(",")]


@pytest.mark.parametrize(
    ("name", "given", "num_rows"),
    [
        ("plain", (), 8),
        ("plain", LAYOUT, 8),
        ("plain", ("--global-batch-size", 12, KEEP_RATE), 12),
        ("second epoch", ("--world-size", 4), 8),
        ("epoch's end", ("--world-size", 1), 2),
        ("growing", ("--world-size", 4, "--micro-batch-size", 2), 8),
        ("growing", ("--global-batch-size", 16, KEEP_RATE), 16),
        ("cost window", ("--world-size", 4), 8),
        ("packings", (), 8),
    ],
)
def test_the_next_rows_are_those_the_plan_has_at_the_position_on_any_layout(
    megasft: Command, world: SimpleNamespace, name: str, given: tuple[object, ...], num_rows: int
) -> None:
    seen, consumed = megasft("resume-check", world.runs[name], *given), SAVED[name].consumed
    assert seen.code == 0, seen.out + seen.err
    plan = plan_rows(
        open_store(world.store),
        row_tokens=ROW_TOKENS,
        align_tokens=8,
        seed=SEED,
        num_packings=2 if name == "packings" else 1,
    )
    order = plan.order(seed=SEED, window=CostWindow(3, 8) if name == "cost window" else None)
    rows = next_rows(seen.out)
    assert rows == [order[k] for k in range(consumed, consumed + num_rows)]
    assert f"made.jsonl:{plan.rows[rows[0]][0] + 1} (sample {plan.rows[rows[0]][0]}" in seen.out
    assert "Traceback" not in seen.err and "INFO" not in seen.err


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("plain", f"iteration 3, 24 rows consumed, epoch 1, 24 of its {NUM_ROWS} rows"),
        ("second epoch", f"72 rows consumed, epoch 2, {72 - NUM_ROWS} of its {NUM_ROWS} rows"),
        ("epoch's end", f"{NUM_ROWS} rows consumed, epoch 2, at its start"),
    ],
)
def test_the_place_of_a_run_is_told_in_epochs(
    megasft: Command, world: SimpleNamespace, name: str, place: str
) -> None:
    assert place in megasft("resume-check", world.runs[name], "--show-rows", 0).out


def test_an_epoch_of_several_packings_has_rows_of_its_own(
    megasft: Command, world: SimpleNamespace
) -> None:
    plan = plan_rows(
        open_store(world.store), row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED, num_packings=2
    )
    first, second = np.diff(plan.stages).tolist()
    out = megasft("resume-check", world.runs["packings"]).out
    assert f"epoch 2, {72 - first} of its {second} rows" in out


def test_what_changes_is_named_with_both_values_and_nothing_else(
    megasft: Command, world: SimpleNamespace
) -> None:
    def changes(name: str, *given: object) -> list[tuple[str, ...]]:
        out = megasft("resume-check", world.runs[name], *given).out
        return re.findall(r"resume-next: (\S.*): (\S.*) in the checkpoint, (.*) now", out)

    assert changes("plain") == []
    assert changes("plain", *LAYOUT) == [
        ("ranks", "2", "16"),
        ("--context-parallel-size", "1", "2"),
        ("--pipeline-model-parallel-size", "1", "2"),
        ("--tensor-model-parallel-size", "1", "2"),
    ]
    assert changes("plain", "--seed", SEED, "--lr", 1e-3) == [], "given again, and the same"
    replaced = changes("growing", "--global-batch-size", 16, KEEP_RATE)
    assert ("--step-batch-size-schedule", "0:4 768:8 2304:16", "None") in replaced


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ((), ("learning rate 0.00075; 9 steps to come",)),
        (("--lr", 4e-4, "--override-opt-param-scheduler"), ("learning rate 0.0003; 9 steps",)),
        (
            ("--lr", 4e-4, KEEP_RATE),
            ("learning rate 0.00075; 9 steps", "the learning rate of the checkpoint: --lr 0.001, "),
        ),
        (
            ("--megasft-epochs", 3),
            ("the run was 12 iterations long and is 24 iterations now", "rate 0.000875; 21 steps"),
        ),
        (("--no-load-optim",), ("learning rate 0.001; 9", "the optimizer is not loaded")),
        (("--train-iters", 3, KEEP_RATE), ("the run ends before its next step: 3 steps are done",)),
    ],
)
def test_the_rate_of_the_next_step_is_that_of_the_schedule_that_holds(
    megasft: Command, world: SimpleNamespace, given: tuple[object, ...], lines: tuple[str, ...]
) -> None:
    """Of a linear decay of 12 steps three are done; 3/4 of the rate are left."""
    seen = megasft("resume-check", world.runs["plain"], *given)
    text = " ".join(seen.out.split())
    assert seen.code == 0, text
    for line in lines:
        assert line in text, text


REFUSED: dict[str, tuple[str, tuple[object, ...], str]] = {
    "seed": (
        *("plain", ("--seed", 12)),
        r"trained on other rows \(checkpoint: seed 11, this run: seed 12\)",
    ),
    "cost window": (
        *("plain", ("--megasft-cost-window", 4)),
        "checkpoint: no cost window, this run: cost window 4 batches of 8 rows",
    ),
    "schedule": (
        *("plain", ("--global-batch-size", 16)),
        "192 and checkpointvalue 96 .* --use-checkpoint-opt-param-scheduler keeps",
    ),
    "learning rate": (
        *("plain", ("--lr", 1e-4)),
        "0.0001 and checkpointvalue 0.001 .* --override-opt-param-scheduler takes that of the flag",
    ),
    "longer, and another rate": (
        *("plain", ("--megasft-epochs", 3, "--lr", 1e-4)),
        "will refuse the learning-rate schedule: .* --override-opt-param-scheduler takes that",
    ),
    "model": (
        *("plain", ("--num-layers", 4)),
        r"num_layers value from checkpoint \(2\) is not equal to the input argument value \(4\)",
    ),
    "ranks": (*("plain", ("--world-size", 3)), "--global-batch-size 8 is no multiple of 3"),
    "ranks in the ramp": (
        *("growing", ("--world-size", 3)),
        r"batch size \(8\) is not divisible by micro_batch_size \(1\) \* data_parallel_size \(3\)",
    ),
    "unknown flag": (*("plain", ("--no-such-flag", 3)), "--no-such-flag is no flag"),
    "no such flag to leave out": (
        *("plain", ("--without", "sft-x")),
        "--without --sft-x: the run was started without it",
    ),
    "by hand": (*("plain", ("--finetune",)), "set the position by hand, so nothing is resumed"),
    "distributed optimizer": (
        *("distributed", ()),
        "cannot load a checkpoint of --use-distributed-optimizer",
    ),
    "moments of another form": (
        *("distributed", ("--without", "use-distributed-optimizer")),
        "was saved with --use-distributed-optimizer, and without the flag",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_resume_is_refused_and_the_difference_named(
    megasft: Command, world: SimpleNamespace, case: str
) -> None:
    name, given, message = REFUSED[case]
    seen = megasft("resume-check", world.runs[name], *given)
    text = " ".join((seen.out + seen.err).split())
    assert seen.code == 1
    assert re.search(message, text), text
    assert "Traceback" not in text


def test_the_doctor_has_the_same_section_beside_its_own(
    megasft: Command, world: SimpleNamespace, tmp_path: Path
) -> None:
    run = world.runs["plain"]
    short = megasft("resume-check", run / "iter_0000003").out
    whole = megasft("doctor", "--world-size", 2, *world.flags, "--load", run).out
    section = [line for line in short.splitlines() if "resume-next" in line]
    assert len(section) == 6, "place, step, rows, and the samples of three rows"
    assert [line for line in whole.splitlines() if "resume-next" in line] == section
    assert "an epoch is" in whole and "an epoch is" not in short
    assert "resume-next" not in megasft("doctor", *world.flags, "--load", tmp_path).out


def test_a_checkpoint_without_the_flags_as_given_is_shown_without_comparing_them(
    megasft: Command, world: SimpleNamespace, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(world.runs["plain"], older)
    common = older / "iter_0000003" / "common.pt"
    state = torch.load(common, weights_only=False)
    del state["args"].megasft_flags
    torch.save(state, common)

    seen = megasft("doctor", "--world-size", 4, *world.flags, "--load", older)

    assert seen.code == 0, seen.out
    assert "flags are not compared with those of the checkpoint" in seen.out
    assert "ranks: 2 in the checkpoint, 4 now" in seen.out and len(next_rows(seen.out)) == 8
    refused = megasft("resume-check", older)
    assert refused.code == 1 and "megasft doctor --load" in refused.err
