"""Multi-token prediction: its share of the gradient depends on neither objective nor layout."""

from pathlib import Path

import pytest
import torch

from megasft.proof.layouts import Layout
from megasft.proof.samples import random_samples, write_store
from megasft.proof.world import ADAM, ALIGN, BATCH, ROW_TOKENS, SEED
from tests.invariance.runs import record_all

pytestmark = pytest.mark.slow

MODEL = (
    *("--num-layers", 2, "--hidden-size", 64, "--ffn-hidden-size", 96, "--num-attention-heads", 8),
    *("--group-query-attention", "--num-query-groups", 4, "--normalization", "RMSNorm"),
    *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--max-position-embeddings", 512, "--untie-embeddings-and-output-weights"),
    *("--init-method-std", 0.2, "--vocab-size", 256, "--mtp-num-layers", 2),
)

LAYOUTS = (
    Layout(),
    Layout(mbs=4),
    Layout(2, tp=2),
    Layout(2, tp=2, sp=True, mbs=2),
    Layout(2, cp=2),
    Layout(2, cp=2, mbs=2, note="gather", more=("--megasft-attention", "all_gather")),
    Layout(2, pp=2),
    Layout(2),
    Layout(4, cp=2, pp=2),
    Layout(4, cp=4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


def base_flags(folder: Path) -> list[str]:
    sizes = ("--seq-length", ROW_TOKENS, "--global-batch-size", BATCH, "--seed", SEED)
    data = ("--megasft-data", folder / "store", "--megasft-align-tokens", ALIGN)
    steps = ("--train-iters", 2, "--calculate-per-token-loss", "--log-interval", 1000)
    return [str(f) for f in (*data, *sizes, *steps, *MODEL, *ADAM.flags)]


def make_start(folder: Path) -> Path:
    """Save the random weights of one rank: with tensor parallelism each rank draws its own."""
    write_store(folder / "store", random_samples(120, row_tokens=ROW_TOKENS, seed=SEED))
    save = ("--save", folder / "start", "--save-interval", 2, "--no-save-optim", "--no-save-rng")
    still = ("--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--micro-batch-size", 1)
    record_all(1, [[*base_flags(folder), *map(str, (*save, *still))]], folder / "runs0")
    return folder / "start"


def test_mtp_adds_the_same_gradient_whatever_the_objective_on_every_layout(folder: Path) -> None:
    """Two MTP layers. The gradient they add is a run with them minus one with their weight at 0.

    Mirrors ``process_mtp_loss`` of megatron-core 0.19.2, which renormalizes by counts of one rank:
    with any mask but ours the result depends on the cut. Not covered: MTP of interleaved pipelines.
    """
    start = make_start(folder)
    first, largest = None, 0.0
    for ranks in (1, 2, 4):
        runs = [
            (layout, objective, scale)
            for layout in LAYOUTS
            if layout.ranks == ranks
            for objective in ("turn", "token")
            for scale in (0.0, 0.5)
        ]
        flags = [
            [
                *base_flags(folder),
                *("--pretrained-checkpoint", str(start), "--megasft-loss", objective),
                *("--mtp-loss-scaling-factor", str(scale), *layout.flags(num_layers=2)),
            ]
            for layout, objective, scale in runs
        ]
        records = [torch.load(r) for r in record_all(ranks, flags, folder / f"runs{ranks}")]
        for i in range(0, len(runs), 2):
            without, with_mtp = records[i]["gradients"], records[i + 1]["gradients"]
            added = {name: with_mtp[name].double() - without[name].double() for name in without}
            assert all(g.abs().sum() > 0 for name, g in added.items() if "mtp" in name)
            vector = torch.cat([added[name].flatten() for name in sorted(added)])
            first = vector if first is None else first
            error = float((vector - first).norm() / first.norm())
            assert error < 2e-5, f"{runs[i][0].name}, {runs[i][1]}: {error:.1e}"
            largest = max(largest, error)
    assert first is not None and first.norm() > 0.1 and largest > 0
