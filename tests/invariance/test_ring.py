"""Ring attention over real processes equals the definition on the whole row."""

import json
import subprocess
import sys

import pytest

from tests.megatron.runs import ROOT

pytestmark = pytest.mark.slow

NUM_CASES = 60


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Counts and errors by context-parallel size."""
    output = tmp_path_factory.mktemp("ring") / "errors.json"
    command = (sys.executable, "-m", "tests.invariance.ring_worker", str(NUM_CASES), str(output))
    subprocess.run([*command, "2", "4"], check=True, cwd=ROOT, timeout=600)
    return json.loads(output.read_text())


@pytest.mark.parametrize("cp_size", ["2", "4"])
def test_ring_and_its_three_gradients_equal_the_float64_definition(
    cp_size: str, found: dict[str, dict[str, float]]
) -> None:
    """A wrong rectangle or a gradient that comes home to another rank is a wrong model, silently.

    Mirrors ``AttnFuncWithCPAndKVP2P`` of Transformer Engine, which Megatron 0.19.2 uses for the
    same purpose; 60 random document sets over gloo, grouped heads 1, 4 and 8, query and value
    heads of different size, sliding windows, float32; ``all_gather`` and ``sdpa`` on some of them.
    Does not cover NCCL, CUDA kernels or bf16 (tests/gpu). One rank: tests/unit/attention.
    """
    errors = dict(found[cp_size])
    assert errors.pop("rows") == NUM_CASES
    assert errors.pop("windows") > 6 and errors.pop("single_document") == 6
    assert errors.pop("shortest_document") > 15
    assert set(errors) == {f"{n} {w}" for n in ("ring", "all_gather", "sdpa")
                          for w in ("out", "dq", "dk", "dv")}  # fmt: skip
    assert max(errors.values()) < 1e-5, errors
