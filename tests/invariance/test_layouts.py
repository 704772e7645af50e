"""Loss, every gradient and the next parameters equal float64 Hugging Face, on every layout."""

from dataclasses import replace
from pathlib import Path

import pytest

from megasft.proof.families import FAMILIES
from megasft.proof.prove import Settings, prove
from megasft.proof.verdict import Verdict

pytestmark = pytest.mark.slow

EVERYTHING = Settings(
    families=tuple(FAMILIES),
    objectives=("turn",),
    layouts=(),
    max_ranks=4,
    device="cpu",
    defect=None,
    folder=Path(),
)
EIGHT_RANKS = ("TP 2 + SP x CP 2 x PP 2", "CP 2 x PP 2 x VP 2 x DP 2 x EP 4")
# Each way to cut a model or a row, and each option, once or twice; `make test-all` proves all.
CHOSEN = (
    *(
        "sdpa",
        ", gather",
        "CP 2, recompute",
        "DP 2, dist opt",
        "EP 2, dist opt",
        "mbs 2, allgather",
    ),
    *("TP 2 + SP, mbs 2", "TP 2 x PP 2", "VP 2, mbs 2", "VP 2 x DP 2"),
    *("SP x CP 2", "SP x DP 2", "CP 2 x EP 2"),
)


def verdicts(folder: Path, settings: Settings) -> list[Verdict]:
    """One process group per world size, layouts of all families looped inside."""
    announced: list[int] = []
    found = prove(replace(settings, folder=folder), announce=announced.extend, done=lambda _: None)
    assert announced == sorted(v.ranks for v in found)
    wrong = [v for v in found if not v.is_exact]
    assert not wrong, wrong
    return found


def test_the_first_step_is_exact_however_it_is_cut(tmp_path: Path) -> None:
    """What megasft is for; and what a run leaves behind does not pile up.

    Mirrors ``pretrain`` of megatron-core 0.19.2, whole. Does not cover the distributed optimizer's
    checkpoints, Transformer Engine, or 16-bit training.
    """
    # Qwen3-MoE is Qwen2-MoE without shared experts. On eight ranks one dense model and one of
    # experts.
    families = ("qwen3", "llama", "qwen2_moe")
    found = verdicts(tmp_path, replace(EVERYTHING, families=families, layouts=CHOSEN))
    latent = ("CP 2 x EP 2", "EP 2, recompute")
    found += verdicts(tmp_path, replace(EVERYTHING, families=("deepseek_v3",), layouts=latent))
    eight = replace(EVERYTHING, families=("qwen3", "qwen2_moe"), layouts=EIGHT_RANKS, max_ranks=8)
    found += verdicts(tmp_path, eight)

    layouts = [v.family for v in found]
    assert {name: layouts.count(name) for name in layouts} == {
        "qwen3": 13,
        "llama": 1,
        "qwen2_moe": 5,
        "deepseek_v3": 2,
    }
    assert {v.ranks for v in found} == {1, 2, 4, 8}
    # A run's process groups have three threads each and end with it; experts and the distributed
    # optimizer once kept them all.
    for ranks in (2, 4):
        threads = [v.threads for v in found if v.ranks == ranks]
        assert len(threads) >= 6 and 0 < max(threads) < 120, (ranks, threads)


def test_every_objective_is_exact(tmp_path: Path) -> None:
    """Sample and token means, DFT, router losses and weights, also of two rows in a micro-batch.

    Of dense models see ``test_logged_losses.py``, of the long tests.
    """
    chosen = replace(
        EVERYTHING,
        families=("qwen2_moe",),
        objectives=("sample", "token", "dft", "router", "normalized"),
        layouts=("CP 2", "mbs 2, allgather"),
        max_ranks=2,
    )
    found = verdicts(tmp_path, chosen)

    assert len({v.objective for v in found}) == 5
    assert {"CP 2 x EP 2", "DP 2 x EP 2, mbs 2, allgather"} == {v.layout for v in found}
