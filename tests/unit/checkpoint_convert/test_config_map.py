"""Every field of a configuration is mapped, without effect, or an error that names it."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.families import FAMILIES, REFUSED_FAMILIES
from megasft.errors import ConversionError
from tests.unit.checkpoint_convert.published import LLAMA_3_8B as LLAMA3
from tests.unit.checkpoint_convert.published import QWEN3_0_6B as QWEN3
from tests.unit.checkpoint_convert.published import without


def read(folder: Path, config: dict[str, Any]) -> Model:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return read_model(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", r"has no config\.json; give a Hugging Face model folder"),
        ("absent", "absent is not there; give"),
        ("here/absent", "here/absent is not there; give"),
        ("Qwen/Qwen3-8B", "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B, and give Qwen3-8B$"),
    ],
)
def test_what_is_no_folder_of_a_model_leads_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConversionError, match=said):
        read_model(Path(name))


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
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    config = without(LLAMA3, "rope_theta", "rope_scaling") | new
    assert read(tmp_path, config).flags == read(tmp_path, LLAMA3).flags


def test_llama_1_without_key_value_heads_has_no_query_groups(tmp_path: Path) -> None:
    config = without(LLAMA3, "num_key_value_heads")
    assert "--group-query-attention" not in read(tmp_path, config).flags


@pytest.mark.parametrize(
    ("base", "field", "value", "message"),
    [
        (LLAMA3, "attention_multiplier", 0.5, "attention_multiplier = 0.5"),
        (LLAMA3, "quantization_config", {"bits": 4}, "{'bits': 4}, and conversion reads plain"),
        (LLAMA3, "partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5"),
        (LLAMA3, "hidden_act", "gelu", "hidden_act is 'gelu'"),
        (LLAMA3, "attention_bias", True, "attention_bias is True"),
        (LLAMA3, "mlp_bias", True, "mlp_bias is True"),
        (LLAMA3, "rope_theta", 10000.5, "rope_theta is 10000.5"),
        (LLAMA3, "model_type", "opt", "model_type is 'opt'; families that convert: llama, mistral"),
        (LLAMA3, "architectures", ["LlamaForSequenceClassification"], "only LlamaForCausalLM"),
        (LLAMA3, "torch_dtype", "int8", "dtype 'int8' is none"),
        (LLAMA3, "use_sliding_window", True, "use_sliding_window is True"),
        (LLAMA3, "sliding_window", 4096, "sliding_window is 4096, and attention of this family"),
        (QWEN3, "layer_types", ["chunked_attention"] * 28, "layer_types is ['chunked_attention']"),
        (QWEN3, "layer_types", ["sliding_attention"] * 28, "sliding_window is None, and layer_typ"),
        (QWEN3, "use_mrope", True, "use_mrope is True"),
    ],
)
def test_a_field_that_changes_the_model_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], field: str, value: Any, message: str
) -> None:
    read(tmp_path, base)
    with pytest.raises(ConversionError) as error:
        read(tmp_path, base | {field: value})
    assert message in str(error.value)


@pytest.mark.parametrize("name", REFUSED_FAMILIES)
def test_a_family_megatron_cannot_compute_is_refused_with_what_is_missing(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConversionError) as error:
        read(tmp_path, LLAMA3 | {"model_type": name})
    assert f"model_type is '{name}', which Megatron-Core 0.19 cannot compute" in str(error.value)
    assert "embeddings scaled by the square root of the hidden size" in str(error.value)
    assert not REFUSED_FAMILIES.keys() & FAMILIES.keys()


def test_a_window_is_one_less_in_megatron_and_a_pattern_when_some_layers_lack_it(
    tmp_path: Path,
) -> None:
    """Hugging Face counts the query's own position; the logits are compared in another test."""
    window = {"use_sliding_window": True, "sliding_window": 4096}
    flags = " ".join(read(tmp_path, QWEN3 | window | {"max_window_layers": 26}).flags)
    assert f"--window-size 4095,0 --window-attn-skip-freq [{'0,' * 26}1,1]" in flags
    flags = " ".join(read(tmp_path, QWEN3 | window | {"max_window_layers": 0}).flags)
    assert "--window-size 4095,0 --normalization" in flags
    for off in ({"max_window_layers": 28}, {"use_sliding_window": False}):
        assert "--window-size" not in read(tmp_path, QWEN3 | window | off).flags


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        read_model(tmp_path)
