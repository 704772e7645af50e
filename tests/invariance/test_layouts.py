"""Loss, every gradient and the next parameters equal float64 Hugging Face, on every layout."""

from pathlib import Path

import pytest

from megasft.proof.families import FAMILIES
from megasft.proof.prove import Settings, prove
from megasft.proof.verdict import Verdict

pytestmark = pytest.mark.slow


def verdicts(folder: Path, *objectives: str, max_ranks: int) -> list[Verdict]:
    """One process group per world size, layouts of all families looped inside."""
    settings = Settings(
        families=tuple(FAMILIES),
        objectives=objectives,
        layouts=(),
        max_ranks=max_ranks,
        device="cpu",
        defect=None,
        folder=folder,
    )
    announced: list[int] = []
    found = prove(settings, announce=announced.append, done=lambda _: None)
    assert announced == [len(found)]
    return found


def test_the_first_step_is_exact_on_every_layout(tmp_path: Path) -> None:
    """What megasft is for. Router losses are on where there are routers.

    Mirrors ``pretrain`` of megatron-core 0.19.2, whole. Does not cover the distributed optimizer's
    checkpoints, Transformer Engine, or 16-bit training.
    """
    found = verdicts(tmp_path, "turn", "router", max_ranks=8)

    wrong = [v for v in found if not v.is_exact]
    assert not wrong, wrong
    layouts = {(v.family, v.layout) for v in found}
    for family, at_least in (("qwen3", 20), ("qwen2_moe", 8)):
        assert len([name for f, name in layouts if f == family]) >= at_least
    assert {v.ranks for v in found} == {1, 2, 4, 8}


def test_every_objective_is_exact(tmp_path: Path) -> None:
    """Sample and token means and DFT, on one and two ranks."""
    found = verdicts(tmp_path, "sample", "token", "dft", max_ranks=2)

    wrong = [v for v in found if not v.is_exact]
    assert not wrong, wrong
    assert len({v.objective for v in found}) == 3
