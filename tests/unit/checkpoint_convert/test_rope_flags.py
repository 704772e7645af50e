"""Scaled rope becomes Megatron's flags where they can say it, ours where not, or an error."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from checkpoint_convert.config_map import read_model
from checkpoint_convert.families import read_rope
from megasft.errors import ConversionError
from megasft.megatron import rope
from tests.unit.checkpoint_convert.published import (
    DEEPSEEK_V3_BF16,
    LLAMA_3_1_8B,
    LLAMA_3_8B,
    QWEN3_0_6B,
)

LLAMA3 = LLAMA_3_1_8B["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LATENT_YARN = DEEPSEEK_V3_BF16["rope_scaling"]


def flags(folder: Path, config: dict[str, Any], scaling: dict[str, Any] | None) -> list[str]:
    """Return the flags between the rope base and the norm."""
    (folder / "config.json").write_bytes(orjson.dumps(config | {"rope_scaling": scaling}))
    found = list(read_model(folder).flags)
    end = "--normalization" if "--moe-layer-freq" not in found else "--moe-layer-freq"
    return found[found.index("--rotary-base") + 2 : found.index(end)]


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3 | {"original_max_position_embeddings": 4096},
        LLAMA3 | {"low_freq_factor": 2.0},
        LLAMA3 | {"high_freq_factor": 8.0},
        {"rope_type": "linear", "factor": 2.0},
        YARN,
        YARN | {"beta_fast": 16, "beta_slow": 2.5, "attention_factor": 1.5, "truncate": False},
        YARN | {"mscale": 0.5, "mscale_all_dim": 1.0},
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_our_flag_says_what_the_configuration_says(
    tmp_path: Path, scaling: dict[str, Any], place: str
) -> None:
    """The two sides share no code: what one writes, the other has to read."""
    config = LLAMA_3_8B
    if place == "rope_parameters":
        config = config | {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    name, text = flags(tmp_path, config, scaling if place == "rope_scaling" else None)
    assert name == rope.FLAG
    found = rope.parse(text)
    assert {"rope_type": found.rope_type, **found.values} == scaling


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_transformers_4_keeps_the_base_beside_the_scaling(kind: str) -> None:
    """Its ``to_dict`` leaves both where ``config.json`` has them; release 5 moves them together."""
    scaling = None if kind == "default" else {"rope_type": "linear", "factor": 2.0}
    found = read_rope({"rope_theta": 500000.0, "rope_scaling": scaling}, Path("config.json"))
    assert found == (kind, 500000, {} if scaling is None else {"factor": 2.0})


def test_what_stands_for_absent_is_left_out(tmp_path: Path) -> None:
    scaling = YARN | {"mscale": 0, "beta_fast": None, "attention_factor": None}
    assert flags(tmp_path, LLAMA_3_8B, scaling) == flags(tmp_path, LLAMA_3_8B, YARN)


def test_a_context_left_out_is_the_models_own_as_in_transformers(tmp_path: Path) -> None:
    _, text = flags(tmp_path, QWEN3_0_6B, {"type": "yarn", "factor": 4.0})
    assert rope.parse(text).values["original_max_position_embeddings"] == 40960


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["--rotary-scaling-factor", "40", "--mscale", "1", "--mscale-all-dim", "1"]),
        (
            {"mscale": 0.707, "mscale_all_dim": 0.5},
            ["--rotary-scaling-factor", "40", "--mscale", "0.707", "--mscale-all-dim", "0.5"],
        ),
        # Without both scales transformers takes the default factor: Megatron's is 1 and 0.
        (
            {"mscale": 0.707, "mscale_all_dim": 0},
            ["--rotary-scaling-factor", "40", "--mscale", "1", "--mscale-all-dim", "0"],
        ),
        (
            {"beta_fast": None, "beta_slow": None, "mscale": None, "mscale_all_dim": None},
            ["--rotary-scaling-factor", "40", "--mscale", "1", "--mscale-all-dim", "0"],
        ),
        (
            {"beta_slow": 2},
            [
                rope.FLAG,
                '{"rope_type":"yarn","factor":40,"original_max_position_embeddings":4096,'
                '"beta_fast":32,"beta_slow":2,"mscale":1.0,"mscale_all_dim":1.0}',
            ],
        ),
    ],
)
def test_yarn_of_latent_attention(
    tmp_path: Path, changes: dict[str, Any], wanted: list[str]
) -> None:
    found = flags(tmp_path, DEEPSEEK_V3_BF16, LATENT_YARN | changes)
    assert found == ["--rope-type", "yarn", *wanted]


def test_plain_rope_of_latent_attention(tmp_path: Path) -> None:
    """Megatron's fused kernel would refuse it, on a GPU only."""
    plain = ["--rope-type", "rope", "--rotary-scaling-factor", "1", "--no-rope-fusion"]
    assert flags(tmp_path, DEEPSEEK_V3_BF16, None) == plain


@pytest.mark.parametrize(
    ("config", "scaling", "message"),
    [
        (LLAMA_3_8B, {"type": "dynamic", "factor": 2.0}, "depend on the length of the batch"),
        (
            LLAMA_3_8B,
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1], "long_factor": [2]},
            "depend on the length of the batch",
        ),
        (LLAMA_3_8B, {"rope_type": "proportional"}, "rope types that convert are default, linear"),
        (LLAMA_3_8B, {"rope_type": "linear", "factor": 0.0}, "factor has no such value"),
        (LLAMA_3_8B, YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor has no meaning"),
        (LLAMA_3_8B, LLAMA3 | {"beta_fast": 32}, "beta_fast has no meaning for llama3 rope"),
        (LLAMA_3_8B, {"factor": 2.0}, "factor has no meaning for default rope"),
        (DEEPSEEK_V3_BF16, {"type": "linear", "factor": 2.0}, "latent attention has yarn alone"),
        (DEEPSEEK_V3_BF16, LATENT_YARN | {"truncate": False}, "rope scaling's truncate is False"),
        (DEEPSEEK_V3_BF16, LATENT_YARN | {"attention_factor": 1.5}, "attention_factor is 1.5"),
        (DEEPSEEK_V3_BF16, LATENT_YARN | {"mscale": 0}, "mscale_all_dim without mscale"),
    ],
)
def test_rope_that_no_flag_says_is_refused(
    tmp_path: Path, config: dict[str, Any], scaling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError) as error:
        flags(tmp_path, config, scaling)
    assert message in str(error.value)
