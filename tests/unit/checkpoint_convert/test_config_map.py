"""Every field of a configuration is mapped, without effect, or an error that names it."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from checkpoint_convert.config_map import Model, read_model
from megasft.errors import ConversionError

# As the published models have it: the rope base where transformers 4 kept it.
LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(folder: Path, config: dict[str, Any]) -> Model:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return read_model(folder)


def test_llama_3_becomes_these_flags(tmp_path: Path) -> None:
    model = read(tmp_path, LLAMA3)
    assert " ".join(model.flags) == (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--max-position-embeddings 8192 --norm-epsilon 1e-05 --attention-dropout 0 "
        "--padded-vocab-size 128256 --kv-channels 128 --group-query-attention "
        "--num-query-groups 8 --rotary-base 500000 --normalization RMSNorm --swiglu "
        "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 "
        "--untie-embeddings-and-output-weights"
    )
    assert model.dtype == torch.bfloat16 and not model.is_tied
    assert model.hf_config == LLAMA3


def test_qwen3_becomes_these_flags(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3)
    assert " ".join(model.flags) == (
        "--num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 --num-attention-heads 16 "
        "--max-position-embeddings 40960 --norm-epsilon 1e-06 --attention-dropout 0 "
        "--padded-vocab-size 151936 --kv-channels 128 --group-query-attention "
        "--num-query-groups 8 --rotary-base 1000000 --normalization RMSNorm --swiglu "
        "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 --qk-layernorm"
    )
    assert model.is_tied and model.heads == (16, 8, 128)


def test_the_rope_base_is_read_where_transformers_5_keeps_it(tmp_path: Path) -> None:
    config = {name: value for name, value in LLAMA3.items() if not name.startswith("rope")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert read(tmp_path, config).flags == read(tmp_path, LLAMA3).flags


def test_llama_1_without_key_value_heads_has_no_query_groups(tmp_path: Path) -> None:
    config = {name: value for name, value in LLAMA3.items() if name != "num_key_value_heads"}
    assert "--group-query-attention" not in read(tmp_path, config).flags


@pytest.mark.parametrize(
    ("base", "field", "value", "message"),
    [
        (LLAMA3, "attention_multiplier", 0.5, "attention_multiplier = 0.5"),
        (LLAMA3, "quantization_config", {"bits": 4}, "quantization_config = {'bits': 4}"),
        (LLAMA3, "hidden_act", "gelu", "hidden_act is 'gelu'"),
        (LLAMA3, "attention_bias", True, "attention_bias is True"),
        (LLAMA3, "mlp_bias", True, "mlp_bias is True"),
        (LLAMA3, "rope_theta", 10000.5, "rope_theta is 10000.5"),
        (LLAMA3, "model_type", "gemma3", "model_type is 'gemma3'; families that convert: llama"),
        (LLAMA3, "architectures", ["LlamaForSequenceClassification"], "only LlamaForCausalLM"),
        (LLAMA3, "torch_dtype", "int8", "dtype 'int8' is none"),
        (QWEN3, "use_sliding_window", True, "use_sliding_window is True"),
    ],
)
def test_a_field_that_changes_the_model_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], field: str, value: Any, message: str
) -> None:
    read(tmp_path, base)
    with pytest.raises(ConversionError) as error:
        read(tmp_path, base | {field: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_is_refused(tmp_path: Path, scaling: dict[str, Any], place: str) -> None:
    if place == "rope_parameters":
        scaling = scaling | {"rope_theta": 500000.0}
    config = {name: value for name, value in LLAMA3.items() if name != "rope_scaling"}
    with pytest.raises(ConversionError, match=r"rope scaling is .*only plain rope"):
        read(tmp_path, config | {place: scaling})


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        read_model(tmp_path)
