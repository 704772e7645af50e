"""Our frequencies are those of transformers bit by bit, and reach every chunk of a model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megasft.errors import FlagError
from megasft.megatron import rope
from tests.megatron.runs import torchrun

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: list[tuple[dict[str, Any], float]] = [
    (LLAMA_3_1, 500_000.0),
    (LLAMA_3_1 | {"factor": 32.0, "original_max_position_embeddings": 4096}, 10_000.0),
    (LLAMA_3_1 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0}, 500_000.0),
    ({"rope_type": "linear", "factor": 2.5}, 10_000.0),
    (YARN, 1_000_000.0),
    (YARN | {"factor": 0.5}, 1_000_000.0),
    (YARN | {"truncate": False, "attention_factor": 1.1}, 10_000.0),
    (YARN | {"beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.0}, 10_000.0),
    # The whole range of turns falls on one dimension.
    (YARN | {"original_max_position_embeddings": 6}, 10_000.0),
]


def parsed(fields: dict[str, Any]) -> rope.RopeScaling:
    return rope.parse(orjson.dumps(fields).decode())


def of_transformers(fields: dict[str, Any], base: float, dim: int) -> tuple[torch.Tensor, float]:
    parameters = {**fields, "rope_theta": base}
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, rope_parameters=parameters)
    inv_freq, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
    return inv_freq, factor


@pytest.mark.parametrize(("fields", "base"), SCALINGS)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_frequencies_and_factor_are_those_of_transformers(
    fields: dict[str, Any], base: float, dim: int
) -> None:
    scaling = parsed(fields)
    wanted, factor = of_transformers(fields, base, dim)
    assert torch.equal(rope.FORMULAS[scaling.rope_type](scaling.values, dim, base), wanted)
    assert scaling.attention_factor == factor
    plain = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    assert not torch.equal(wanted, plain)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_megatrons_own_llama_3_rope_is_that_of_transformers(factor: float) -> None:
    """Mirrors ``RotaryEmbedding._apply_scaling`` of Megatron 0.19.2, with its 8192, 1 and 4."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rotary = RotaryEmbedding(
        *(128, 1.0),
        rotary_base=500_000,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    wanted, _ = of_transformers(LLAMA_3_1 | {"factor": factor}, 500_000.0, 128)
    assert torch.equal(rotary.inv_freq, wanted)


def flags(fields: dict[str, Any], **changes: Any) -> SimpleNamespace:
    given = {
        "megasft_rope_scaling": orjson.dumps(fields).decode(),
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
        "multi_latent_attention": False,
        "rotary_percent": 1.0,
        "no_rope_freq": None,
        "rope_type": None,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }
    return SimpleNamespace(**(given | changes))


def test_good_flags_pass_and_no_flag_is_no_scaling() -> None:
    assert rope.from_flags(flags({}, megasft_rope_scaling=None)) is None
    found = rope.from_flags(flags(YARN))
    assert found is not None and found.rope_type == "yarn"
    assert rope.from_flags(flags(YARN, multi_latent_attention=True, rope_type="yarn")) is not None
    # Partly rotated heads are no problem where scores are not scaled.
    assert rope.from_flags(flags(LLAMA_3_1, rotary_percent=0.5)) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 2.0}, "rope_type is None; it must be one of linear, llama3, yarn"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'; it must be one of"),
        ({"rope_type": ["yarn"]}, "rope_type is ['yarn']; it must be one of"),
        ({"rope_type": "linear"}, "linear rope lacks factor"),
        ({"rope_type": "linear", "factor": 2, "low": 1}, "does not know low"),
        (LLAMA_3_1 | {"factor": 0}, "factor is 0; it must be a number above 0"),
        (LLAMA_3_1 | {"factor": "8"}, "factor is '8'; it must be a number"),
        (YARN | {"truncate": 1}, "truncate is 1; it must be true or false"),
    ],
)
def test_a_scaling_that_is_none_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError) as error:
        rope.from_flags(flags(fields))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "yarn"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(FlagError, match=r"is (not JSON|no JSON object)"):
        rope.parse(text)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (LLAMA_3_1, {"use_rope_scaling": True}, "--use-rope-scaling exclude each other"),
        (YARN, {"rotary_seq_len_interpolation_factor": 2}, "interpolation-factor exclude"),
        (YARN, {"position_embedding_type": "none"}, "add --position-embedding-type rope"),
        (YARN, {"rotary_percent": 0.5}, "--rotary-percent below 1 leaves scores without rope"),
        (YARN, {"no_rope_freq": [0, 1]}, "--no-rope-freq leaves scores without rope"),
        (LLAMA_3_1, {"multi_latent_attention": True}, "both must be yarn"),
        (YARN, {"multi_latent_attention": True, "rope_type": "rope"}, "both must be yarn"),
        (YARN, {"multi_latent_attention": True, "mscale": 0.7}, "--mscale exclude each other"),
        (
            YARN | {"truncate": True},
            {"multi_latent_attention": True},
            "latent attention does not know truncate",
        ),
    ],
)
def test_flags_that_contradict_a_scaling_are_refused(
    fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    rope.from_flags(flags(fields))
    with pytest.raises(FlagError) as error:
        rope.from_flags(flags(fields, **changes))
    assert message in str(error.value)


@pytest.mark.slow
def test_every_stage_and_chunk_is_scaled_with_multi_token_prediction_too(tmp_path: Path) -> None:
    """A stage that keeps plain frequencies is one whose layers forget where tokens are.

    Mirrors ``GPTModelBuilder.build_distributed_models`` of Megatron 0.19.2: two pipeline stages
    with two virtual chunks each, with and without an MTP layer on the last one. It does not run
    the chunks; ``test_converted_families`` compares logits over two stages.
    """
    sizes = ("--num-layers", 4, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 16)
    more = (
        "--max-position-embeddings",
        64,
        "--vocab-size",
        96,
        "--position-embedding-type",
        "rope",
    )
    run = ("--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 1, "--lr", 1e-4)
    stages = ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)
    scaling = ("--megasft-rope-scaling", orjson.dumps(YARN).decode(), "--rotary-base", 10_000)
    shared = [str(flag) for flag in (*sizes, *more, *run, *stages, *scaling)]
    runs = [shared, [*shared, "--mtp-num-layers", "1"]]
    (tmp_path / "runs.json").write_bytes(orjson.dumps(runs))
    worker = "tests.unit.megatron.rope_worker"
    torchrun(2, "-m", worker, str(tmp_path / "runs.json"), str(tmp_path))
    wanted, factor = of_transformers(YARN, 10_000.0, 16)
    for run_number in range(2):
        for rank in range(2):
            found = torch.load(tmp_path / f"{run_number}_{rank}.pt")
            assert len(found["inv_freq"]) == 2
            assert all(torch.equal(each, wanted) for each in found["inv_freq"])
            num_attentions = 3 if (run_number, rank) == (1, 1) else 2
            assert found["scale"] == [16**-0.5 * factor**2] * num_attentions
