"""The first step's loss and gradient norm equal the definition, on every layout."""

import pytest

from megasft.packing.plan import plan_rows
from tests.megatron.conftest import BATCH, ROW_TOKENS, SEED, World
from tests.megatron.runs import scalars, train
from tests.oracle import global_batch
from tests.stores import sample, write_store

pytestmark = pytest.mark.slow

LAYOUTS = {
    1: {"TP 1": ()},
    2: {
        "TP 2": ("--tensor-model-parallel-size", 2),
        "TP 2 + SP": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        "CP 2": ("--context-parallel-size", 2),
        "PP 2": ("--pipeline-model-parallel-size", 2),
        "DP 2": (),
    },
    4: {
        "TP 2 x CP 2": ("--tensor-model-parallel-size", 2, "--context-parallel-size", 2),
        "TP 2 + SP x CP 2": (
            *("--tensor-model-parallel-size", 2, "--context-parallel-size", 2),
            "--sequence-parallel",
        ),
        "DP 2 x PP 2": ("--pipeline-model-parallel-size", 2),
        "DP 2 x PP 2, interleaved": (
            *("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
        ),
        "CP 4": ("--context-parallel-size", 4),
    },
}


def data_parallel_size(layout: str) -> int:
    return 2 if "DP 2" in layout else 1


@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_loss_and_gradient_norm_equal_the_float64_definition(world: World, world_size: int) -> None:
    """A turn mean that depends on the layout or on accumulation is the defect megasft exists for.

    Mirrors ``pretrain`` with ``finalize_model_grads`` (megatron-core 0.19.2); compares what they
    report with the oracle. Does not cover MoE or the ring.
    """
    runs, names = [], []
    for layout, parallel in LAYOUTS[world_size].items():
        rows_per_rank = BATCH // data_parallel_size(layout)
        for num_micro_batches in (1, 2, 4) if world_size < 4 else (4,):
            name = f"{layout}-{num_micro_batches}"
            micro = ("--micro-batch-size", rows_per_rank // num_micro_batches)
            runs.append(world.flags(name, *parallel, *micro))
            names.append(name)
    train(world_size, runs, world.folder / f"world{world_size}")

    expected = world.oracle("turn")
    assert expected.units > 2 * BATCH and expected.grad_norm > 0.1
    for name in names:
        logged = scalars(world.folder / name)
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), name
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), name
        assert logged["turns"][1] == pytest.approx(expected.units, rel=1e-6), name


def test_every_objective_and_the_validation_loss_equal_their_definition(world: World) -> None:
    """Validation takes the same road: sum over sum over a whole store of any size."""
    cases = [("turn", 0.0), ("sample", 0.0), ("token", 0.0), ("turn", 0.8)]
    # A learning rate of 0 leaves the weights alone, so validation after the step is comparable.
    still = ("--micro-batch-size", 2, "--lr", 0, "--context-parallel-size", 2)
    runs = [
        world.flags(f"{o}-{a}", "--megasft-loss", o, "--megasft-dft-alpha", a, *still)
        for o, a in cases
    ]
    train(2, runs, world.folder / "objectives")

    losses = set()
    for objective, alpha in cases:
        name = f"{objective}-{alpha}"
        logged = scalars(world.folder / name)
        expected = world.oracle(objective, dft_alpha=alpha)
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), name
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), name
        losses.add(round(expected.loss, 3))
        whole = world.whole_store()
        valid = global_batch(world.model, whole, objective=objective, dft_alpha=alpha)
        assert logged["lm loss validation"][1] == pytest.approx(valid.loss, rel=1e-5), name
    assert len(losses) == len(cases), "the losses must differ for this test to say anything"


def test_edge_rows_change_nothing(world: World) -> None:
    """What kills runs elsewhere: rows and micro-batches without a label, a document that fills its
    row, a turn across every seam, documents shorter than a share, a validation set smaller than a
    batch. Not covered: a global batch without any label, in which there is nothing to train.
    """
    ids = [(7 * i) % 251 for i in range(ROW_TOKENS)]
    fills_its_row = sample(ids, (1, ROW_TOKENS - 1))
    without_labels = sample(ids[:90])
    shorter_than_a_share = [sample(ids[i : i + 2], (1, 1)) for i in range(5)]
    many_turns = sample(ids[:60], *((i, 1) for i in range(1, 60, 2)))
    samples = [fills_its_row, without_labels, *shorter_than_a_share, many_turns]
    store = write_store(world.folder / "edges", samples)
    small = write_store(world.folder / "small", [many_turns])
    rows = plan_rows(store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
    assert sorted(rows.turns.tolist())[:1] == [0], "one row must be without labels"
    data = ("--megasft-data", store.path, "--megasft-valid-data", small.path, "--lr", 0)
    sizes = ("--global-batch-size", 4, "--micro-batch-size", 1)
    assert len(rows) == 4

    layouts = {2: {"DP 2": (), "CP 2": ("--context-parallel-size", 2)}}
    layouts[4] = {"CP 4": ("--context-parallel-size", 4)}
    for world_size, named in layouts.items():
        runs = [world.flags(f"edge {n}", *data, *sizes, *flags) for n, flags in named.items()]
        train(world_size, runs, world.folder / f"edges{world_size}")

    expected = global_batch(world.model, samples, objective="turn")
    valid = global_batch(world.model, [many_turns], objective="turn")
    assert (expected.units, valid.units) == (36, 30)
    for name in (n for named in layouts.values() for n in named):
        logged = scalars(world.folder / f"edge {name}")
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), name
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), name
        assert logged["lm loss validation"][1] == pytest.approx(valid.loss, rel=1e-5), name
