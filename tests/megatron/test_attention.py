"""Recomputation, windows and latent attention train the same step whatever computes attention."""

import pytest

from tests.megatron.conftest import World
from tests.megatron.runs import scalars, train

pytestmark = pytest.mark.slow

RECOMPUTE = {
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform",
             "--recompute-num-layers", 1),
    "selective": ("--recompute-granularity", "selective"),
}  # fmt: skip
LATENT_MODEL = (
    *("--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4),
    *("--multi-latent-attention", "--rope-type", "rope", "--position-embedding-type", "rope"),
    *("--q-lora-rank", 16, "--kv-lora-rank", 16, "--qk-head-dim", 16),
    *("--qk-pos-emb-head-dim", 8, "--v-head-dim", 12),
    *("--normalization", "RMSNorm", "--init-method-std", 0.2, "--max-position-embeddings", 512),
)
PARALLEL = ("--context-parallel-size", 2)


def test_recomputation_and_the_reference_train_the_same_step_under_cp(world: World) -> None:
    """The other backends, and the ring recomputed in full, are in tests/invariance/test_layouts.py.

    Recomputation runs a layer's messages again inside backward, on every rank in the same order.

    Mirrors ``CheckpointFunction`` (megatron-core 0.19.2, tensor_parallel/random.py). Does not
    cover offloading or CUDA graphs.
    """
    named = {
        "reference": ("reference", ()),
        "ring selective": ("ring", RECOMPUTE["selective"]),
        "all_gather full": ("all_gather", RECOMPUTE["full"]),
    }
    runs = [
        world.flags(f"attention {name}", "--megasft-attention", backend, *PARALLEL, *flags)
        for name, (backend, flags) in named.items()
    ]
    train(2, runs, world.folder / "attention")

    expected = world.oracle("turn")
    for name in named:
        logged = scalars(world.folder / f"attention {name}")
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), name
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), name


def test_windows_and_latent_attention_equal_the_reference_on_one_rank(world: World) -> None:
    """Models the tiny Qwen3 of the other tests does not stand for; the first step on two ranks.

    Mirrors ``is_layer_window_attention`` and ``MLASelfAttention`` (megatron-core 0.19.2).
    """
    from_scratch = list(world.flags("unused"))
    at = from_scratch.index("--megasft-hf")
    data = from_scratch[:at] + from_scratch[at + 2 :]
    windows = ("--window-size", "2,0", "--window-attn-skip-freq", 2)

    def run(name: str, *more: object) -> list[str]:
        board = ("--tensorboard-dir", world.folder / name)
        return [str(flag) for flag in (*data, *board, *more)]

    def runs(where: str, backend: str, *more: object) -> list[list[str]]:
        attention = ("--megasft-attention", backend, *more)
        return [
            world.flags(f"window {where}", *windows, *attention),
            run(f"latent {where}", *LATENT_MODEL, *attention),
        ]

    train(1, runs("reference", "reference"), world.folder / "odd1")
    train(2, [*runs("ring 2", "ring", *PARALLEL), *runs("gather 2", "all_gather", *PARALLEL)],
          world.folder / "odd2")  # fmt: skip

    plain = world.oracle("turn")
    for model in ("window", "latent"):
        expected = scalars(world.folder / f"{model} reference")
        assert abs(expected["lm loss"][1] - plain.loss) > 1e-3, "the model must differ from Qwen3"
        for where in ("ring 2", "gather 2"):
            logged = scalars(world.folder / f"{model} {where}")
            for what, tolerance in (("lm loss", 1e-5), ("grad-norm", 1e-4)):
                wanted = expected[what][1]
                assert logged[what][1] == pytest.approx(wanted, rel=tolerance), (model, where, what)
