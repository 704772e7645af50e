"""Every converted family, loaded by the real training entry point, computes Hugging Face's logits.

One run per model and layout: conversion, flags, checkpoint, Megatron's own ``load_checkpoint`` and
the data path of a training run, at TP 1 and on four ranks. The comparison is per token, against
transformers in float32. What it finds is the table in ``checkpoint_convert/README.md``; with
MEGASFT_WRITE_DOCS=1 this test writes it, otherwise it checks that the rows there are these.
"""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from checkpoint_convert import hf_to_megatron
from checkpoint_convert.cli import Report
from checkpoint_convert.config_map import Model, read_model
from megasft.schema import Sample
from tests.megatron.runs import ROOT, torchrun
from tests.stores import sample, write_store
from tests.unit.checkpoint_convert.tiny_models import MODELS, TOKENS, TOLERANCE, make, save

VOCAB, ROW = 98, 48

README = ROOT / "checkpoint_convert" / "README.md"
BEGIN, END = "<!-- families: written by a test -->\n", "<!-- families: end -->\n"
COLUMNS = (
    *("tiny model", "class", "tensors: HF, Megatron", "both ways"),
    *("TP 1, largest Δlogit", "4 ranks", "largest Δlogit"),
)
HEADER = f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


class Layout(NamedTuple):
    """How the table calls it, and Megatron's flags."""

    label: str
    flags: tuple[str, ...]


def four_ranks(model: Model) -> Layout:
    """Return the layout of four ranks: TP 2 x PP 2 (x EP 2), or without TP for latent attention."""
    label, flags = [], []
    if model.family_name != "deepseek_v3":  # Megatron's local layers; see megatron/model.py
        label.append("TP 2")
        flags += ["--tensor-model-parallel-size", "2"]
    label.append("PP 2")
    flags += ["--pipeline-model-parallel-size", "2"]
    if model.num_layers % 2:
        flags += ["--decoder-first-pipeline-num-layers", "1"]
    if model.num_experts:
        label.append("EP 2")
        flags += ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    if model.num_experts and "TP 2" in label:
        flags.append("--sequence-parallel")
    return Layout(" x ".join(label), tuple(flags))


def documents() -> list[Sample]:
    """Two documents to a row, two rows: the global batch."""
    return [sample(tokens, (4, len(tokens) - 4)) for tokens in TOKENS.tolist()]


class Run(NamedTuple):
    """A converted model; logits are files, by the layout of the run that wrote them."""

    report: Report
    architecture: str
    logits: dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Convert every model and run it on one and on four ranks."""
    folder = tmp_path_factory.mktemp("families")
    store = write_store(folder / "store", documents(), vocab_size=VOCAB)
    by_ranks: dict[int, list[dict[str, object]]] = {1: [], 4: []}
    found: dict[str, Run] = {}
    for name in MODELS:
        report = hf_to_megatron.convert(save(name, folder / f"{name}_hf"), folder / name)
        model = read_model(folder / f"{name}_hf")
        found[name] = Run(report, model.hf_config["architectures"][0], {})
        for ranks, layout in ((1, Layout("TP 1", ())), (4, four_ranks(model))):
            path = folder / f"{name}.{ranks}"
            flags = [
                *("--megasft-data", store.path, "--megasft-hf", folder / name),
                *("--calculate-per-token-loss", "--seq-length", ROW, "--micro-batch-size", 1),
                *("--global-batch-size", 2, "--train-iters", 1, "--lr", 0, *layout.flags),
            ]
            by_ranks[ranks].append({"flags": list(map(str, flags)), "logits": str(path)})
            found[name].logits[layout.label] = path
    for ranks, cases in by_ranks.items():
        (folder / f"{ranks}.json").write_text(json.dumps(cases))
        torchrun(ranks, "-m", "tests.megatron.logits_worker", str(folder / f"{ranks}.json"))
    return found


def documents_of(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every document a run saw: tokens [T], logits [T, V] of all tensor-parallel ranks."""
    rows: dict[tuple[int, ...], dict[int, dict[str, torch.Tensor]]] = {}
    for file in path.parent.glob(f"{path.name}.*"):
        for part in torch.load(file):
            row = rows.setdefault(tuple(part["tokens"].tolist()), {})
            row[part["tp_rank"]] = part
    for row in rows.values():
        logits = torch.cat([row[rank]["logits"] for rank in sorted(row)], dim=-1)
        borders = row[0]["cu_seqlens"].tolist()
        for start, end in pairwise(borders):
            yield row[0]["tokens"][start:end], logits[start:end]


def worst_error(name: str, path: Path) -> tuple[float, float]:
    """Return the largest |Δlogit| and |logit| of all documents, and look at what is compared."""
    model, error, largest, seen = make(name), 0.0, 0.0, 0
    for tokens, found in documents_of(path):
        with torch.no_grad():
            wanted = model(tokens[None]).logits[0]
        assert found.shape == wanted.shape == (TOKENS.shape[1], VOCAB) and wanted.std() > 0.5
        error = max(error, float((found - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
        seen += 1
    assert seen == len(TOKENS)
    return error, largest


@pytest.fixture(scope="module")
def errors(runs: dict[str, Run]) -> dict[str, dict[str, tuple[float, float]]]:
    """The largest error and the largest logit of every model, by layout."""
    return {
        name: {label: worst_error(name, path) for label, path in run.logits.items()}
        for name, run in runs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_training_entry_point_computes_the_logits_of_hugging_face(
    name: str, errors: dict[str, dict[str, tuple[float, float]]]
) -> None:
    assert len(errors[name]) == 2
    assert all(error <= TOLERANCE * largest for error, largest in errors[name].values()), errors


@pytest.mark.slow
def test_the_readme_has_a_row_for_every_model(
    runs: dict[str, Run], errors: dict[str, dict[str, tuple[float, float]]]
) -> None:
    """Figures move with the machine; models, classes, counts and layouts do not."""
    table = HEADER + "".join(row(name, runs[name], errors[name]) for name in MODELS)
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("MEGASFT_WRITE_DOCS"):
        README.write_text(f"{before}{BEGIN}{table}\n{END}{after}")
        return
    assert facts(written) == facts(table), "run this file with MEGASFT_WRITE_DOCS=1"


def row(name: str, run: Run, errors: dict[str, tuple[float, float]]) -> str:
    """Return the line of the table; that all goes both ways is ``test_round_trip.py``."""
    one, four = errors
    cells = (
        name,
        run.architecture,
        f"{run.report.num_hf_tensors}, {run.report.num_megatron_tensors}",
        "bitwise equal",
        f"{errors[one][0]:.1e}",
        four,
        f"{errors[four][0]:.1e}",
    )
    return f"| {' | '.join(cells)} |\n"


def facts(table: str) -> list[list[str]]:
    """Return the cells that do not depend on the machine."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [[cell for i, cell in enumerate(cells) if i not in (4, 6)] for cells in rows]
