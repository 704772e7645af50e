"""Ring attention over real processes equals the definition on the whole row."""

import json
from pathlib import Path

import pytest

from tests.megatron.runs import torchrun

pytestmark = pytest.mark.slow

NUM_CASES = 200


@pytest.mark.parametrize("cp_size", [2, 4])
def test_ring_and_its_three_gradients_equal_the_float64_definition(
    cp_size: int, tmp_path: Path
) -> None:
    """A wrong rectangle or a gradient that comes home to another rank is a wrong model, silently.

    Mirrors ``AttnFuncWithCPAndKVP2P`` of Transformer Engine, which Megatron 0.19.2 uses for the
    same purpose; 200 random document sets over gloo, grouped heads 1, 4 and 8, query and value
    heads of different size, sliding windows, float32; ``all_gather`` and ``sdpa`` on some of them.
    Does not cover NCCL, CUDA kernels or bf16 (tests/gpu). One rank: tests/unit/attention.
    """
    output = tmp_path / "errors.json"
    arguments = (str(cp_size), str(NUM_CASES), str(output))
    torchrun(4, "-m", "tests.invariance.ring_worker", *arguments)

    found = json.loads(output.read_text())
    assert found.pop("rows") == NUM_CASES
    assert found.pop("windows") > 20 and found.pop("single_document") == 20
    assert found.pop("shortest_document") > 50
    assert set(found) == {f"{n} {w}" for n in ("ring", "all_gather", "sdpa")
                          for w in ("out", "dq", "dk", "dv")}  # fmt: skip
    assert max(found.values()) < 1e-5, found
