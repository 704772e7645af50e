"""A micro-batch asks as much of a GPU for many documents as for one, and never waits for a value.

On a GPU every operator is a launch and every read of a value a wait, so what a step asks is part of
what it computes. Counted by ``tools/bench_launches.py`` on the real Megatron model and loop,
forward and backward, with a stand-in for the attention kernel. Not covered: Transformer Engine's
layers, and what Megatron itself reads of a step.
"""

import pytest

from tools.bench_launches import MODELS, count

pytestmark = pytest.mark.slow

FEW, MANY = 1, 60
AFTER_BACKWARD = ("megasft/megatron/hooks.py:", "megasft/training/report.py:")
"""Ours that run once a step."""


def check(models: list[str], cp_size: int, *, most_a_layer: dict[str, int]) -> None:
    documents, layers = (FEW, MANY), (2, 4)
    found = count(models, [cp_size], documents=documents, layers=layers, row_tokens=2048)
    for model in models:
        one, many = (found[model, cp_size, number, 4] for number in documents)
        assert one.operators == many.operators, model
        assert one.largest_bytes == many.largest_bytes, model
        reads = [read for read in many.reads if read.startswith("megasft/")]
        assert not [read for read in reads if not read.startswith(AFTER_BACKWARD)], model
        shallow = found[model, cp_size, MANY, 2].operators
        assert (many.operators.total() - shallow.total()) / 2 == most_a_layer[model]


def test_documents_change_no_count_under_context_parallelism() -> None:
    check(["dense", "mtp"], 2, most_a_layer={"dense": 191, "mtp": 191})


@pytest.mark.long
def test_documents_change_no_count_of_any_model() -> None:
    check(list(MODELS), 1, most_a_layer={"dense": 151, "moe": 248, "latent": 169, "mtp": 151})
