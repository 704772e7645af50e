"""Several validation stores in one run: each is evaluated whole, under its own name."""

import pytest

from tests.megatron.conftest import VOCAB, World
from tests.megatron.runs import scalars, train
from tests.stores import random_samples, sample, write_store

pytestmark = pytest.mark.slow


def evaluation(*, micro: int, whole: int) -> tuple[object, ...]:
    return ("--eval-micro-batch-size", micro, "--eval-global-batch-size", whole)


def test_every_validation_store_logs_the_loss_of_its_own_samples(world: World) -> None:
    """One store of a single row, one of rows that fill no whole batch, on three layouts.

    Why it matters: a small set must not vanish in a large one, nor be averaged over ranks, and
    Megatron's loader knows nothing of ``--eval-micro-batch-size`` by itself, here another one than
    that of training. Mirrors ``evaluate`` and ``build_pretraining_data_loader`` (megatron-core
    0.19.2). Does not cover interleaved pipeline stages, and resuming in the middle of a pass.
    """
    ids = [(7 * i) % 251 for i in range(60)]
    made = {
        "tiny": [sample(ids, *((i, 1) for i in range(1, 60, 2)))],
        "large": random_samples(45, seed=9, vocab=VOCAB),
    }
    paths = {n: write_store(world.folder / f"valid-{n}", made[n]).path for n in made}
    stores = [f"tiny={paths['tiny']}", paths["large"]]
    names = {"tiny": "tiny", "large": "valid-large"}
    layouts = {
        "DP 2": ("--micro-batch-size", 2, "--eval-micro-batch-size", 1),
        "CP 2": ("--context-parallel-size", 2, *evaluation(micro=2, whole=2)),
        "PP 2": ("--pipeline-model-parallel-size", 2, *evaluation(micro=3, whole=6)),
    }
    flags = ("--megasft-valid-data", *stores, "--lr", 0)

    output = train(
        2,
        [world.flags(f"sets {n}", *flags, *more) for n, more in layouts.items()],
        world.folder / "w-sets",
    )

    assert "validation tiny: 1 rows" in output
    assert output.count("[megasft] validation tiny after step 1  loss ") == len(layouts)
    expected = {n: world.oracle("turn", samples=made[n]).loss for n in made}
    both = world.oracle("turn", samples=[*made["tiny"], *made["large"]]).loss
    assert abs(expected["tiny"] - expected["large"]) > 1e-2, "the losses must tell sets apart"
    for layout in layouts:
        logged = scalars(world.folder / f"sets {layout}")
        for store, name in names.items():
            found = logged[f"lm loss {name} validation"][1]
            assert found == pytest.approx(expected[store], rel=1e-5), (layout, store)
        assert logged["lm loss validation"][1] == pytest.approx(both, rel=1e-5), layout
