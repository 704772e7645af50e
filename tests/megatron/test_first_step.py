"""The first step's loss and gradient norm equal the definition, on every layout."""

from pathlib import Path

import pytest
import torch

from megasft.packing.order import RowOrder
from megasft.packing.plan import plan_rows
from megasft.schema import Sample
from megasft.store import TokenStore
from tests.megatron.runs import scalars, train
from tests.oracle import Oracle, global_batch
from tests.stores import random_samples, write_store

pytestmark = pytest.mark.slow

ROW_TOKENS, BATCH, SEED, VOCAB = 96, 8, 11, 256
COMMON = (
    *("--calculate-per-token-loss", "--seq-length", ROW_TOKENS, "--global-batch-size", BATCH),
    *("--train-iters", 1, "--lr", 1e-3, "--seed", SEED, "--eval-interval", 1, "--clip-grad", 1.0),
    *("--log-interval", 1, "--tensorboard-log-interval", 1),
)
LAYOUTS = {
    1: {"TP 1": ()},
    2: {
        "TP 2": ("--tensor-model-parallel-size", 2),
        "CP 2": ("--context-parallel-size", 2),
        "PP 2": ("--pipeline-model-parallel-size", 2),
        "DP 2": (),
    },
    4: {
        "TP 2 x CP 2": ("--tensor-model-parallel-size", 2, "--context-parallel-size", 2),
        "DP 2 x PP 2": ("--pipeline-model-parallel-size", 2),
        "CP 4": ("--context-parallel-size", 4),
    },
}


def data_parallel_size(layout: str) -> int:
    return 2 if "DP 2" in layout else 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    return World(tmp_path_factory.mktemp("first_step"))


class World:
    """A store, a tiny Hugging Face model and its Megatron checkpoint; oracles once each."""

    def __init__(self, folder: Path) -> None:
        from checkpoint_convert.hf_to_megatron import convert
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.folder = folder
        self.store = write_store(folder / "store", random_samples(150, seed=5, vocab=VOCAB))
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        config = Qwen3Config(
            **sizes, **heads, vocab_size=VOCAB, max_position_embeddings=512,
            tie_word_embeddings=False, initializer_range=0.2,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config)
        self.model.save_pretrained(folder / "hf")
        convert(folder / "hf", folder / "megatron")
        self.model = self.model.double()

    def oracle(self, objective: str) -> Oracle:
        return global_batch(self.model, self.first_batch(), objective=objective)

    def first_batch(self) -> list[Sample]:
        plan = plan_rows(self.store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
        order = RowOrder(num_rows=len(plan), seed=SEED)
        rows = [plan.rows[order[k]] for k in range(BATCH)]
        return [self.store.sample(int(i)) for row in rows for i in row]

    def flags(self, name: str, *more: object) -> list[str]:
        paths = ("--megasft-data", self.store.path, "--megasft-valid-data", self.store.path)
        model = ("--megasft-hf", self.folder / "megatron")
        board = ("--tensorboard-dir", self.folder / name)
        return [str(f) for f in (*paths, *model, *board, *COMMON, *more)]


def whole(store: TokenStore) -> list[Sample]:
    return [store.sample(i) for i in range(len(store))]


@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_loss_and_gradient_norm_equal_the_float64_definition(world: World, world_size: int) -> None:
    """A turn mean that depends on the layout or on accumulation is the defect megasft exists for.

    Mirrors ``pretrain`` with ``finalize_model_grads`` (megatron-core 0.19.2); compares what they
    report with the oracle. Does not cover MoE, sequence parallelism or the ring.
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
    objectives = ("turn", "sample", "token")
    # A learning rate of 0 leaves the weights alone, so validation after the step is comparable.
    runs = [
        world.flags(
            f"objective-{o}",
            "--megasft-loss",
            o,
            "--micro-batch-size",
            2,
            "--lr",
            0,
            "--context-parallel-size",
            2,
        )
        for o in objectives
    ]
    train(2, runs, world.folder / "objectives")

    losses = set()
    for objective in objectives:
        logged = scalars(world.folder / f"objective-{objective}")
        expected = world.oracle(objective)
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), objective
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), objective
        losses.add(round(expected.loss, 3))
        valid = global_batch(world.model, whole(world.store), objective=objective)
        assert logged["lm loss validation"][1] == pytest.approx(valid.loss, rel=1e-5), objective
    assert len(losses) == 3, "the three objectives must differ for this test to say anything"
