"""Rows that kill runs elsewhere: loss, every gradient and the next parameters are still exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megasft.proof.oracle import Truth, saved_names
from megasft.proof.samples import sample, write_store
from megasft.proof.verdict import Verdict, compare
from megasft.proof.world import ADAM, OBJECTIVES, ROW_TOKENS, World
from megasft.ranks.layout import Layout
from megasft.schema import Sample
from megasft.store import open_store
from tests.invariance.runs import record_all
from tests.megatron.runs import scalars

pytestmark = pytest.mark.slow

IDS = [(7 * i) % 251 for i in range(ROW_TOKENS)]
TALK = sample(IDS[:90], (3, 4), (20, 60))
EOS = 5


DP, CP, TP_CP = Layout(2), Layout(4, cp=4), Layout(4, tp=2, sp=True, cp=2)


class Edge(NamedTuple):
    """Samples of a store; all of it is one global batch of ``rows`` rows, on some layouts."""

    samples: list[Sample]
    rows: int
    mbs: int = 1
    pad_token: int = 0
    layouts: tuple[Layout, ...] = (CP, TP_CP)


EDGES = {
    "row without a label": Edge([sample(IDS[:90]), TALK], 2, layouts=(DP, CP, TP_CP)),
    "micro-batch without a label": Edge(
        [*[sample(IDS[:90])] * 6, TALK, TALK], 8, mbs=2, layouts=(DP, TP_CP)
    ),
    "sample of one token": Edge(
        [TALK, TALK, sample(IDS[:90], (1, 89)), sample([9])], 4, layouts=(TP_CP,)
    ),
    "turn over every seam": Edge([sample(IDS[:64], (1, 63)), sample(IDS[:88], (1, 87))], 2),
    "document fills its row": Edge([sample(IDS, (1, ROW_TOKENS - 1)), sample(IDS, (40, 2))], 2),
    "documents shorter than 2 x cp x tp": Edge(
        [sample(IDS[i : i + 3], (1, 1 + i % 2)) for i in range(24)], 2
    ),
    "pad is eos": Edge(
        [sample([*IDS[:9], EOS, *IDS[9:20], EOS], (4, 6), (12, 10))] * 8, 2, 1, EOS, (TP_CP,)
    ),
    "no label at all": Edge([sample(IDS[:90]), sample(IDS[:70])], 2, layouts=(DP, TP_CP)),
}


@pytest.fixture(scope="module")
def results(qwen3: World) -> dict[str, dict[str, Path]]:
    """Records of every edge on its layouts: edge -> layout -> file."""
    found: dict[str, dict[str, Path]] = {name: {} for name in EDGES}
    for ranks in (2, 4):
        runs = {
            (name, layout.name): flags(qwen3, name, replace(layout, mbs=EDGES[name].mbs))
            for name in EDGES
            for layout in EDGES[name].layouts
            if layout.ranks == ranks
        }
        records = record_all(ranks, list(runs.values()), qwen3.folder / f"edges{ranks}")
        for (name, layout_name), record in zip(runs, records, strict=True):
            found[name][layout_name] = record
    return found


def world_of(qwen3: World, name: str) -> World:
    edge = EDGES[name]
    path = qwen3.folder / "edges" / name.replace(" ", "-")
    exists = path.exists()
    store = (
        open_store(path) if exists else write_store(path, edge.samples, pad_token=edge.pad_token)
    )
    return replace(qwen3, store=store, batch=edge.rows)


def flags(qwen3: World, name: str, layout: Layout) -> list[str]:
    board = ("--tensorboard-dir", qwen3.folder / "boards" / name / layout.name)
    # The second step of a layout is trained in test_layouts.
    steps = ("--tensorboard-log-interval", 1, "--log-interval", 1, "--train-iters", 1)
    world = world_of(qwen3, name)
    return [*world.flags(layout, OBJECTIVES["turn"]), *map(str, (*board, *steps))]


def judge(qwen3: World, results: Any, name: str) -> Truth:
    world = world_of(qwen3, name)
    assert len(world.plan) == world.batch, "the store must be exactly one global batch"
    truth = world.truth(OBJECTIVES["turn"])
    start = saved_names(world.hf, {p: p for p in world.hf.parameters()})
    assert len(results[name]) == len(EDGES[name].layouts)
    for layout, record in results[name].items():
        errors = compare(record, truth, world.model, start)
        verdict = Verdict("qwen3", layout, 0, "turn", **errors)
        assert verdict.is_exact, f"{layout}: {verdict}"
    return truth


def test_a_row_without_a_label_is_a_no_op(qwen3: World, results: Any) -> None:
    plan = world_of(qwen3, "row without a label").plan
    assert sorted(plan.turns.tolist()) == [0, 2]
    assert judge(qwen3, results, "row without a label").units == 2


def test_a_micro_batch_without_a_label_is_a_no_op(qwen3: World, results: Any) -> None:
    world = world_of(qwen3, "micro-batch without a label")
    turns = [
        sum(len(sample.turns) for row in world.samples(rows) for sample in row)
        for rows in world.micro_batches(dp_size=2, mbs=2)
    ]
    assert 0 in turns and any(turns)
    judge(qwen3, results, "micro-batch without a label")


def test_a_sample_of_one_token_changes_nothing(qwen3: World, results: Any) -> None:
    judge(qwen3, results, "sample of one token")


def test_a_turn_cut_by_every_seam_loses_no_label(qwen3: World, results: Any) -> None:
    judge(qwen3, results, "turn over every seam")


def test_a_document_may_fill_its_row_exactly(qwen3: World, results: Any) -> None:
    assert world_of(qwen3, "document fills its row").plan.tokens.tolist() == [ROW_TOKENS] * 2
    judge(qwen3, results, "document fills its row")


def test_documents_may_be_shorter_than_the_shares(qwen3: World, results: Any) -> None:
    judge(qwen3, results, "documents shorter than 2 x cp x tp")


def test_an_eos_that_is_the_pad_token_is_trained(qwen3: World, results: Any) -> None:
    assert judge(qwen3, results, "pad is eos").units == 16


def test_a_global_batch_without_a_label_leaves_all_but_decay_alone(
    qwen3: World, results: Any
) -> None:
    name = "no label at all"
    for layout, path in results[name].items():
        record = torch.load(path, weights_only=True)
        assert record["loss"] == 0.0 and record["units"] == 0
        assert all(not g.any() for g in record["gradients"].values()), layout
        logged = scalars(qwen3.folder / "boards" / name / layout)
        assert logged["lm loss"][1] == 0.0 and logged["token loss"][1] == 0.0
        assert logged["grad-norm"][1] == 0.0
    truth = judge(qwen3, results, name)
    assert truth.units == 0
    start = dict(qwen3.hf.named_parameters())
    norm = truth.parameters["model.norm.weight"] - start["model.norm.weight"]
    head = truth.parameters["lm_head.weight"] / start["lm_head.weight"]
    assert not norm.any() and head.mean().item() == pytest.approx(1 - ADAM.lr * ADAM.weight_decay)
