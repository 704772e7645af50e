"""A micro-batch asks as much of a GPU for 256 documents as for one, and never waits for a value.

On a GPU every operator is a launch and every read of a value a wait, so what a step asks is part of
what it computes. Counted by ``tools/bench_launches.py`` on the real Megatron model, forward and
backward, with a stand-in for the attention kernel.
"""

from collections import Counter

import pytest

from tools.bench_launches import DOCUMENTS, LAYERS, MODELS, count

pytestmark = pytest.mark.slow

A_LAYER = {
    ("dense", 1): 151,
    ("dense", 2): 191,
}
"""Operators of a layer, attention one of them: after a change for the worse, find out why."""

OF_A_STEP = ("megasft/megatron/hooks.py:", "megasft/training/report.py:")
"""Ours that run once after the backward pass."""


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_number_of_documents_changes_no_count(cp_size: int) -> None:
    found = count(list(MODELS), [cp_size])
    for model in MODELS:
        few, many = LAYERS
        counts = [found[model, cp_size, documents, many] for documents in DOCUMENTS]
        totals = {one.operators.total() for one in counts}
        assert len(totals) == 1, f"{model}: {totals}"
        assert len({one.largest_bytes for one in counts}) == 1
        reads = [r for r in counts[-1].reads if r.startswith("megasft/")]
        assert not [r for r in reads if not r.startswith(OF_A_STEP)], reads
        less = found[model, cp_size, DOCUMENTS[-1], few].operators
        a_layer = (counts[-1].operators.total() - less.total()) / (many - few)
        assert a_layer <= A_LAYER.get((model, cp_size), a_layer)
        assert Counter(counts[-1].operators)["megasft/attention/blockwise.py:attend"] > 0
