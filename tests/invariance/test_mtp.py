"""Multi-token prediction: its share of the gradient depends on neither objective nor layout."""

from pathlib import Path

import pytest

from megasft.proof.samples import random_samples, write_store
from megasft.proof.world import ADAM, ALIGN, BATCH, ROW_TOKENS, SEED
from megasft.ranks.layout import Layout
from tests.invariance.added import added_gradients, relative
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
    Layout(mbs=4),
    Layout(2, tp=2, sp=True, mbs=2),
    Layout(2, cp=2, mbs=2, note="gather", more=("--megasft-attention", "all_gather")),
    Layout(4, cp=2, pp=2),
)
# The divisor is scaled in one place for all layouts, so one with all but TP sees both objectives.
PAIRS = (*((layout, "turn") for layout in LAYOUTS), (LAYOUTS[-1], "token"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


def base_flags(folder: Path) -> list[str]:
    sizes = ("--seq-length", ROW_TOKENS, "--global-batch-size", BATCH, "--seed", SEED)
    data = ("--megasft-data", folder / "store", "--megasft-align-tokens", ALIGN)
    steps = ("--train-iters", 1, "--calculate-per-token-loss", "--log-interval", 1000)
    return [str(f) for f in (*data, *sizes, *steps, *MODEL, *ADAM.flags)]


def make_start(folder: Path) -> Path:
    """Save the random weights of one rank: with tensor parallelism each rank draws its own."""
    write_store(folder / "store", random_samples(120, row_tokens=ROW_TOKENS, seed=SEED))
    save = ("--save", folder / "start", "--save-interval", 1, "--no-save-optim", "--no-save-rng")
    still = ("--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--micro-batch-size", 1)
    record_all(1, [[*base_flags(folder), *map(str, (*save, *still))]], folder / "runs0")
    return folder / "start"


def test_mtp_adds_the_same_gradient_whatever_the_objective_on_every_layout(folder: Path) -> None:
    """Two MTP layers. The gradient they add is a run with them minus one with their weight at 0.

    Mirrors ``process_mtp_loss`` of megatron-core 0.19.2, which renormalizes by counts of one rank:
    with any mask but ours the result depends on the cut. Not covered: MTP of interleaved pipelines.
    """
    start = make_start(folder)

    def flags(layout: Layout, objective: str, is_on: bool) -> list[str]:
        weight = ("--mtp-loss-scaling-factor", "0.5" if is_on else "0.0")
        begin = ("--pretrained-checkpoint", str(start), "--megasft-loss", objective)
        return [*base_flags(folder), *begin, *weight, *layout.flags(num_layers=2)]

    runs = added_gradients(PAIRS, flags=flags, folder=folder)
    assert len(runs) == len(PAIRS)
    first = runs[0].vector
    assert first.norm() > 0.1
    for run in runs:
        assert all(g.abs().sum() > 0 for name, g in run.gradients.items() if "mtp" in name)
        assert relative(run.vector, first) < 2e-5, f"{run.layout.name}, {run.objective}"
