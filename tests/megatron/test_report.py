"""What a run reports of each step equals an offline computation from per-token losses.

Why it matters: a category's loss is read by people who mix data by it, and nothing else would show
that one share was lost. Mirrors Megatron 0.19's ``train_step`` (reduction of what is reported, over
data and context parallelism) and ``training_log``. Not covered: CUDA, and a rerun of a step by
Megatron's result validation.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megasft.packing.order import RowOrder
from megasft.packing.plan import plan_rows
from megasft.report.record import LENGTH_NAMES, POSITION_NAMES
from megasft.report.spikes import read_spikes
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store
from tests.megatron.conftest import BATCH, ROW_TOKENS, SEED, VOCAB, World
from tests.megatron.runs import scalars, train

pytestmark = pytest.mark.slow

NAMES = {1: "maths", 4: "talk", 9: "rare"}
STEPS = 4
LAYOUTS: dict[str, tuple[object, ...]] = {
    "DP 2": (),
    "CP 2": ("--context-parallel-size", 2, "--micro-batch-size", 2),
    "PP 2": ("--pipeline-model-parallel-size", 2),
    "TP 2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
}


class Label(NamedTuple):
    """A label, and what it falls under."""

    ce: float
    of_turn: int
    of_sample: int
    category: int
    number: int


def conversations(num: int, *, seed: int) -> list[Sample]:
    """Samples of up to ten turns; one in 25 is of a category of its own, a third of none."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(num):
        records, at = [], int(rng.integers(1, 4))
        sizes = rng.integers(1, 4, 10) if i % 10 == 3 else rng.integers(1, 22, rng.integers(0, 4))
        for n, size in enumerate(sizes.tolist()):
            category = 9 if i % 25 == 7 else (0, 1, 4)[(i + n) % 3]
            records.append((at, size, category, n))
            at += size + int(rng.integers(1, 4))
        tokens = rng.integers(0, VOCAB, max(at, 6)).astype(np.int32)
        samples.append(Sample(tokens, turn_records(records)))
    return samples


def store_of(path: Path, samples: Sequence[Sample]) -> TokenStore:
    with StoreWriter(path, vocab_size=VOCAB) as writer:
        for line, one in enumerate(samples, start=1):
            writer.add(one, source=0, line=line)
        names = {str(i): name for i, name in NAMES.items()}
        made = {"counts": {}, "categories": names, "sources": [{"path": "made.jsonl"}]}
        writer.finish({**made, "special_tokens": {"pad": 0}})
    return open_store(path)


def labels_of(model: Any, one: Sample) -> list[Label]:
    """Cross entropy of each label of a sample, in float64."""
    with torch.no_grad():
        logits = model(torch.from_numpy(one.tokens).long().unsqueeze(0)).logits[0]
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], torch.from_numpy(one.tokens[1:]).long(), reduction="none"
    ).tolist()
    turns, of_sample = one.turns.tolist(), int(one.turns[:, 1].sum())
    return [
        Label(losses[t - 1], size, of_sample, category, number)
        for number, (start, size, category, *_) in enumerate(turns, start=1)
        for t in range(start, start + size)
    ]


def rows_of_steps(store: TokenStore) -> list[list[int]]:
    """Samples of each step."""
    plan = plan_rows(store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
    order = RowOrder(num_rows=len(plan), seed=SEED)
    rows = [[order[k] for k in range(n * BATCH, (n + 1) * BATCH)] for n in range(STEPS)]
    return [[int(i) for row in step for i in plan.rows[row]] for step in rows]


def mean(labels: Sequence[Label]) -> float:
    return math.fsum(label.ce for label in labels) / len(labels)


def group_means(labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Loss per token of each category, turn position and turn length that has a label."""
    borders = [1, 16, 64, 256, 1024, 4096, 16384, 10**9]
    sorted_by = {
        "categories": {name: [x for x in labels if x.category == i] for i, name in NAMES.items()},
        "turn_positions": {
            name: [x for x in labels if x.number == n or (n == 8 and x.number > 8)]
            for n, name in enumerate(POSITION_NAMES, start=1)
        },
        "turn_lengths": {
            name: [x for x in labels if a <= x.of_turn < b]
            for name, (a, b) in zip(LENGTH_NAMES, pairwise(borders), strict=True)
        },
    }
    return {
        group: {name: mean(found) for name, found in parts.items() if found}
        for group, parts in sorted_by.items()
    }


def check_losses(line: dict[str, Any], labels: Sequence[Label]) -> None:
    turns = sum(1 / x.of_turn for x in labels)
    samples = sum(1 / x.of_sample for x in labels)
    assert (line["labels"], line["turns"], line["samples"]) == (
        *(len(labels), round(turns), round(samples)),
    )
    # float32 model, float64 oracle
    near = {"rel": 2e-5}
    assert line["token_loss"] == pytest.approx(mean(labels), **near)
    by_turn = math.fsum(x.ce / x.of_turn for x in labels) / turns
    assert line["turn_loss"] == pytest.approx(by_turn, **near)
    by_sample = math.fsum(x.ce / x.of_sample for x in labels) / samples
    assert line["sample_loss"] == pytest.approx(by_sample, **near)
    p_correct = math.fsum(math.exp(-x.ce) for x in labels) / len(labels)
    assert line["avg_p_correct"] == pytest.approx(p_correct, rel=1e-4)
    dft = math.fsum(x.ce * math.exp(-x.ce) / x.of_turn for x in labels) / turns
    assert line["dft_loss"] == pytest.approx(dft, rel=1e-4)
    assert line["loss"] == line["turn_loss"]
    for group, wanted in group_means(labels).items():
        found = {name: means["loss"] for name, means in line[group].items()}
        assert found == pytest.approx(wanted, **near), group
    for name, loss in group_means(labels)["categories"].items():
        assert line[f"{name}_loss"] == pytest.approx(loss, **near)


def lines_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of steps and of evaluations."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "validation" in x]


class Runs(NamedTuple):
    """What all runs of this file have left; one process group serves them."""

    store: TokenStore
    valid: dict[str, TokenStore]
    log_of: dict[str, Path]
    resumed: Path
    output: str


@pytest.fixture(scope="module")
def runs(world: World) -> Runs:
    store = store_of(world.folder / "categories", conversations(140, seed=3))
    some = store_of(world.folder / "some_set", conversations(30, seed=6))
    small = store_of(world.folder / "small_set", conversations(9, seed=4))
    # A learning rate of 0 leaves the weights alone, so every step is comparable.
    still = ("--lr", 0, "--train-iters", STEPS, "--eval-interval", STEPS, "--megasft-spikes", 0.1)
    data = ("--megasft-data", store.path, "--megasft-table-interval", 2)
    valid = ("--megasft-valid-data", f"some={some.path}", f"few={small.path}")
    log_of = {name: world.folder / f"log {name}" for name in LAYOUTS}
    flags = [
        world.flags(
            f"report {name}", *data, *valid, *still, *layout, "--megasft-log-dir", log_of[name]
        )
        for name, layout in LAYOUTS.items()
    ]
    # The first run saves and ends at step 2, the second gets to step 3 without saving it, and the
    # third trains step 3 again, on another layout.
    save, log = world.folder / "resumed", world.folder / "resumed log"
    saved = ("--load", save, "--save-interval", 2, "--eval-interval", 2, "--train-iters", STEPS)
    to_go_on = ("--megasft-log-dir", log, "--megasft-dft-alpha", 0.5, "--megasft-table-interval", 0)
    again = world.flags("resumed board", *saved, *to_go_on)
    flags += [
        [*again, "--save", str(save), "--exit-interval", "2"],
        [*again, "--exit-interval", "3"],
        [*again, "--save", str(save), "--context-parallel-size", "2"],
    ]
    output = train(2, flags, world.folder / "report")
    return Runs(store, {"some": some, "few": small}, log_of, log, output)


def test_losses_by_category_position_and_length_are_the_same_on_every_layout(
    world: World, runs: Runs
) -> None:
    store = runs.store
    samples = [store.sample(i) for i in range(len(store))]
    of_sample = [labels_of(world.model, one) for one in samples]
    steps = rows_of_steps(store)
    labels_of_step = [[x for i in step for x in of_sample[i]] for step in steps]
    has_rare = [any(x.category == 9 for x in labels) for labels in labels_of_step]
    assert True in has_rare and False in has_rare, "a category is absent from some steps only"
    labels_of_set = {
        name: [x for i in range(len(valid)) for x in labels_of(world.model, valid.sample(i))]
        for name, valid in runs.valid.items()
    }
    num_rows = len(plan_rows(store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED))
    assert STEPS * BATCH / num_rows > 0.5, "epochs must move for this test to say anything"
    for name, log in runs.log_of.items():
        trained, evaluated = lines_of(log)
        assert [line["steps"] for line in trained] == [1, 2, 3, 4], name
        epochs = [step * BATCH / num_rows for step in (1, 2, 3, 4)]
        assert [line["epoch"] for line in trained] == pytest.approx(epochs), name
        for line, labels in zip(trained, labels_of_step, strict=True):
            check_losses(line, labels)
        for line, step in zip(trained, steps, strict=True):
            tokens = sum(len(samples[i].tokens) for i in step)
            assert line["padding"] == pytest.approx(1 - tokens / (BATCH * ROW_TOKENS))
            per_second = line["tokens_per_second"] * line["seconds"] * 2
            assert per_second == pytest.approx(tokens)
        assert evaluated[-1]["steps"] == STEPS
        assert evaluated[-1]["validation"].keys() == labels_of_set.keys()
        for set_name, labels in labels_of_set.items():
            found = evaluated[-1]["validation"][set_name]
            check_losses(found, labels)
            assert found["perplexity"] == pytest.approx(math.exp(mean(labels)), rel=2e-4)

        board = scalars(world.folder / f"report {name}")
        for line in trained:
            step = line["steps"]
            assert board["lm loss"][step] == pytest.approx(line["loss"], rel=1e-5)
            assert board["train/loss"][step] == pytest.approx(line["loss"], rel=1e-5)
            assert board["grad-norm"][step] == pytest.approx(line["grad_norm"], rel=1e-5)
            for total in ("turns", "samples", "label tokens"):
                of_line = line["labels" if total == "label tokens" else total]
                assert board[total][step] == pytest.approx(of_line, rel=1e-6), (name, total)
            rare = board["category/rare"].get(step)
            assert rare == (pytest.approx(line["rare_loss"]) if has_rare[step - 1] else None)
        assert "eval/few/category/maths" in board
    num_runs = len(LAYOUTS) + 1  # that begin with step 1
    assert runs.output.count("[megasft] step 1/4 ") == num_runs, "rank 0 prints, and no other"
    assert runs.output.count("turn mean") >= 2 * len(LAYOUTS), "tables of categories"


def test_the_losses_of_the_conversations_of_a_step_are_kept_on_every_layout(
    world: World, runs: Runs
) -> None:
    """With a factor of 0.1 the first step that can be a spike is one."""
    step = rows_of_steps(runs.store)[STEPS - 1]
    wanted = {}
    for i in set(step):
        labels = labels_of(world.model, runs.store.sample(i))
        if labels:
            wanted[i] = (mean(labels), len(labels))
    assert len(wanted) > BATCH, "rows hold several samples"
    for name, log in runs.log_of.items():
        (spike,) = read_spikes(log)
        assert spike.step == STEPS, name
        found = {sample: (loss, labels) for sample, loss, labels in spike.samples}
        assert found.keys() == wanted.keys(), name
        for sample, (loss, labels) in wanted.items():
            assert found[sample] == (pytest.approx(loss, rel=5e-5), labels), (name, sample)
        losses = [one.loss for one in spike.samples]
        assert losses == sorted(losses, reverse=True)
    assert runs.output.count("lists its conversations by loss") == len(LAYOUTS)


def test_a_run_that_is_resumed_goes_on_with_its_log(world: World, runs: Runs) -> None:
    """Nothing waits for a next step, so ``--exit-interval`` loses no line of the last one."""
    trained, evaluated = lines_of(runs.resumed)
    before = (runs.resumed / "steps.jsonl.before").read_text().splitlines()
    steps = [json.loads(line)["steps"] for line in before]
    assert steps == [1, 2, 2, 3], "steps 1 and 2, the evaluation, step 3 of the second run"
    assert [line["steps"] for line in trained] == [1, 2, 3, 4]
    assert [line["steps"] for line in evaluated] == [2, 4], "each step once"
    board = scalars(world.folder / "resumed board")
    for line in trained:
        step = line["steps"]
        assert board["lm loss"][step] == pytest.approx(line["loss"], rel=1e-4)
        assert line["loss"] == pytest.approx(line["dft_loss"]) != line["turn_loss"]
        # Megatron logs the rate of the next step, ours is the one the step was made with.
        if step < STEPS:
            assert board["learning-rate"][step] == pytest.approx(trained[step]["lr"])
