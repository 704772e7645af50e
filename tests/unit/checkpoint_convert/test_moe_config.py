"""Configurations of models with experts: what becomes a flag, and what is refused by name."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from checkpoint_convert.config_map import Model, read_model
from megasft.errors import ConversionError
from tests.unit.checkpoint_convert.published import (
    DEEPSEEK_V3_BF16,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    without,
)

QWEN2_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# The published one but for fp8 and the number of layers.
DEEPSEEK_V3: dict[str, Any] = DEEPSEEK_V3_BF16 | {"num_hidden_layers": 5}


def read(folder: Path, config: dict[str, Any]) -> Model:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return read_model(folder)


def test_qwen3_30b_a3b_becomes_these_flags(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3_30B_A3B)
    assert " ".join(model.flags) == (
        "--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 "
        "--max-position-embeddings 40960 --norm-epsilon 1e-06 --attention-dropout 0 "
        "--padded-vocab-size 151936 --num-experts 128 --moe-router-topk 8 "
        "--moe-ffn-hidden-size 768 --kv-channels 128 --group-query-attention "
        "--num-query-groups 4 --rotary-base 1000000 --normalization RMSNorm --swiglu "
        "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0 "
        "--moe-token-dispatcher-type alltoall --qk-layernorm "
        "--untie-embeddings-and-output-weights"
    )
    assert model.num_experts == 128 and model.has_layer_axis and len(model.is_sparse) == 48


def test_the_number_of_experts_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    config = without(QWEN3_30B_A3B, "num_experts")
    assert read(tmp_path, config | {"num_local_experts": 16}).num_experts == 16


def test_qwen2_moe_has_a_gated_shared_expert_and_does_not_renormalize(tmp_path: Path) -> None:
    flags = " ".join(read(tmp_path, QWEN2_MOE).flags)
    for wanted in (
        "--num-experts 60 --moe-router-topk 4 --moe-ffn-hidden-size 1408 "
        "--moe-shared-expert-intermediate-size 5632",
        "--add-qkv-bias --moe-shared-expert-gate --moe-router-pre-softmax",
    ):
        assert wanted in flags
    # Hugging Face computes the router in the model's dtype.
    assert "--moe-router-dtype" not in flags
    renormalized = read(tmp_path, QWEN2_MOE | {"norm_topk_prob": True})
    assert "--moe-router-pre-softmax" not in renormalized.flags


def test_dense_layers_between_sparse_ones_are_a_pattern(tmp_path: Path) -> None:
    changes = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = read(tmp_path, QWEN2_MOE | changes)
    assert "--moe-layer-freq [0,1,0,0]" in " ".join(model.flags)
    assert not model.has_layer_axis
    assert "--moe-layer-freq" not in read(tmp_path, QWEN2_MOE).flags


def test_deepseek_v3_becomes_these_flags(tmp_path: Path) -> None:
    model = read(tmp_path, DEEPSEEK_V3)
    assert " ".join(model.flags) == (
        "--num-layers 5 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 "
        "--max-position-embeddings 163840 --norm-epsilon 1e-06 --attention-dropout 0 "
        "--padded-vocab-size 129280 --num-experts 256 --moe-router-topk 8 "
        "--moe-ffn-hidden-size 2048 --moe-router-topk-scaling-factor 2.5 --kv-lora-rank 512 "
        "--qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --kv-channels 64 "
        "--rotary-base 10000 --rope-type yarn --rotary-scaling-factor 40 --mscale 1 "
        "--mscale-all-dim 1 --moe-layer-freq [0,0,0,1,1] --normalization RMSNorm --swiglu "
        "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0 "
        "--moe-token-dispatcher-type alltoall --multi-latent-attention --qk-layernorm "
        "--moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0 "
        "--moe-router-dtype fp32 --q-lora-rank 1536 --moe-shared-expert-intermediate-size 2048 "
        "--moe-router-num-groups 8 --moe-router-group-topk 4 "
        "--untie-embeddings-and-output-weights"
    )


def test_groups_that_are_all_chosen_are_no_groups(tmp_path: Path) -> None:
    for groups in (1, 8):
        flags = read(tmp_path, DEEPSEEK_V3 | {"n_group": groups, "topk_group": groups}).flags
        assert "--moe-router-num-groups" not in flags and "--moe-router-group-topk" not in flags


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3_30B_A3B, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (
            QWEN3_30B_A3B,
            {"shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size =",
        ),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, "does not renormalize"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 99}, "no layer has experts"),
        (QWEN3_30B_A3B, {"layer_types": ["sliding_attention"] * 48}, "layer_types is ['sliding_"),
        (MIXTRAL_8X7B, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 1}, "does not renormalize"),
        (MIXTRAL_8X7B, {"layer_types": ["sliding_attention"] * 32}, "layer_types is ['sliding_"),
        (QWEN2_MOE, {"qkv_bias": False}, "qkv_bias is False"),
        (DEEPSEEK_V3, {"q_lora_rank": None}, "q_lora_rank is None, and Megatron norms the query"),
        (DEEPSEEK_V3, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, and only 1e-06"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        (DEEPSEEK_V3, {"norm_topk_prob": False}, "norm_topk_prob is False"),
        (DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave is False"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 6}, "best experts, Hugging Face by 2"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 1}, "does not renormalize"),
        (DEEPSEEK_V3, {"n_group": None}, "n_group, topk_group is (None, 4)"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        (DEEPSEEK_V3, {"n_shared_experts": 0}, "n_shared_experts is 0"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias is True"),
        (DEEPSEEK_V3, {"first_k_dense_replace": 5}, "no layer has experts"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "field 'kv_lora_rank'"),
    ],
)
def test_what_the_two_frameworks_understand_differently_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    read(tmp_path, base)
    with pytest.raises(ConversionError) as error:
        read(tmp_path, base | changes)
    assert message in str(error.value)


def test_a_scoring_function_that_the_file_does_not_state_is_not_guessed(tmp_path: Path) -> None:
    """transformers drops it when it saves; others then take a softmax (logits off by 2.4)."""
    with pytest.raises(
        ConversionError, match=r'has no scoring_func.*add "scoring_func": "sigmoid"'
    ):
        read(tmp_path, without(DEEPSEEK_V3, "scoring_func"))
    # The biases in the folder say which method it is.
    same = read(tmp_path, without(DEEPSEEK_V3, "topk_method"))
    assert same.flags == read(tmp_path, DEEPSEEK_V3).flags


def test_fp8_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    with pytest.raises(ConversionError, match=r"'fp8'.*make a bfloat16 copy .*fp8_cast_bf16\.py"):
        read(tmp_path, DEEPSEEK_V3 | fp8)
    assert read(tmp_path, DEEPSEEK_V3 | {"quantization_config": None}).num_experts == 256
