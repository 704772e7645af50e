"""Rules on literal tensors one can check by eye."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_convert.config_map import read_model
from checkpoint_convert.rules import (
    GATED,
    QKV,
    WHOLE,
    Heads,
    Join,
    Rule,
    merged,
    same_bits,
    split,
)
from checkpoint_convert.tensor_map import to_megatron
from megasft.errors import ConversionError
from tests.unit.checkpoint_convert.tiny_models import save

# Four heads in two groups, one number per head: head h of Q is 1h, of K 2h, of V 3h.
HEADS = Heads(num_heads=4, num_groups=2, head_dim=1)
Q = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
K = torch.tensor([[20.0], [21.0]])
V = torch.tensor([[30.0], [31.0]])
RULE = Rule("linear_qkv", ("{layer}.q", "{layer}.k", "{layer}.v"), QKV)


def test_q_k_and_v_interleave_by_query_group() -> None:
    whole = merged(RULE, (Q, K, V), HEADS, verify=True)
    assert whole.flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    parts = split(RULE, whole, HEADS, verify=True)
    assert [part.flatten().tolist() for part in parts] == [
        [10, 11, 12, 13],
        [20, 21],
        [30, 31],
    ]


def test_heads_keep_their_rows_together_and_biases_follow_the_weights() -> None:
    heads = Heads(num_heads=2, num_groups=1, head_dim=2)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8])
    assert merged(RULE, (q, k, v), heads, verify=True).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    two_groups = Heads(num_heads=2, num_groups=2, head_dim=1)
    bias = merged(RULE, (q[:2], k, v), two_groups, verify=True)
    assert bias.tolist() == [1, 5, 7, 2, 6, 8]


def test_gate_comes_before_up() -> None:
    rule = Rule("fc1", ("gate", "up"), GATED)
    gate, up = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    whole = merged(rule, (gate, up), HEADS, verify=True)
    assert whole.flatten().tolist() == [1, 2, 3, 4]
    assert torch.equal(split(rule, whole, HEADS, verify=True)[1], up)


def test_a_rule_that_does_not_come_back_is_an_error_unless_told_not_to_look() -> None:
    swapped = Rule("linear_qkv", RULE.hf, Join(merge=QKV.merge, split=_k_for_q))
    merged(swapped, (Q, Q, Q), Heads(4, 4, 1), verify=False)
    with pytest.raises(ConversionError, match="does not come back bitwise"):
        merged(swapped, (Q, Q + 1, Q + 2), Heads(4, 4, 1), verify=True)


def _k_for_q(whole: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    q, k, v = QKV.split(whole, heads)
    return k, q, v


def test_another_number_of_heads_than_the_tensor_has_is_an_error() -> None:
    with pytest.raises(ConversionError, match=r"has 8 rows, and 4 heads .* make 16"):
        split(RULE, torch.zeros(8, 1), Heads(4, 2, 2), verify=True)


def test_parts_of_different_dtypes_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"torch\.bfloat16, torch\.float32"):
        merged(RULE, (Q, K.bfloat16(), V), HEADS, verify=True)


def test_equal_bits_tell_nan_from_nothing_and_zero_from_minus_zero() -> None:
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))


def test_a_rule_without_a_layer_has_one_name() -> None:
    rule = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE)
    assert not rule.is_per_layer and rule.hf_names(layer=3) == ("model.norm.weight",)
    assert RULE.is_per_layer and RULE.hf_names(layer=3) == ("3.q", "3.k", "3.v")


def test_the_rule_of_one_layer_names_it_on_both_sides() -> None:
    rule = Rule("decoder.layers.mlp.linear_fc2.weight", ("model.layers.{layer}.down",), WHOLE)
    one = rule.at(3)
    assert one.megatron == "decoder.layers.3.mlp.linear_fc2.weight"
    assert one.hf == ("model.layers.3.down",) and not one.is_per_layer and one.layer == 3


def test_the_rule_of_one_layer_still_has_an_expert_axis() -> None:
    rule = Rule(
        "decoder.layers.experts.fc2", ("model.layers.{layer}.experts.{expert}.down",), WHOLE
    )
    assert rule.is_per_expert and rule.at(1).is_per_expert
    assert rule.at(1).hf_names(expert=4) == ("model.layers.1.experts.4.down",)


@pytest.mark.parametrize(
    ("name", "numbers", "wanted"),
    [
        (
            "qwen3",
            {"embed_tokens": 1, "lm_head": 2, "model.norm": 3, "q_norm": 4, "k_norm": 5}
            | {"input_layernorm": 6, "post_attention_layernorm": 7, "gate_proj": 8, "up_proj": 9},
            {"word_embeddings.weight": [1], "output_layer.weight": [2]}
            | {"final_layernorm.weight": [3], "q_layernorm.weight": [4], "k_layernorm.weight": [5]}
            | {"linear_qkv.layer_norm_weight": [6], "linear_fc1.layer_norm_weight": [7]}
            | {"linear_fc1.weight": [8, 9]},
        ),
        (
            "mixtral",
            {"input_layernorm": 1, "post_attention_layernorm": 2, ".w1.": 3, ".w3.": 4, ".w2.": 5},
            {"linear_qkv.layer_norm_weight": [1], "pre_mlp_layernorm.weight": [2]}
            | {"experts.linear_fc1.weight": [3, 4], "experts.linear_fc2.weight": [5]},
        ),
        (
            "qwen2_moe",
            {"shared_expert.gate_proj": 1, "shared_expert.up_proj": 2, "post_attention_": 3}
            | {".0.gate_proj": 4, ".0.up_proj": 5},
            {"shared_experts.linear_fc1.weight": [1, 2], "pre_mlp_layernorm.weight": [3]}
            | {"experts.experts.linear_fc1.weight": [4, 5]},
        ),
    ],
)
def test_tensors_of_one_shape_go_where_megatron_looks_for_them(
    name: str, numbers: dict[str, int], wanted: dict[str, list[int]], tmp_path: Path
) -> None:
    """A pair swapped both ways comes back bit by bit, and computes something else."""
    hf = save(name, tmp_path / "hf")
    tensors = {
        key: torch.zeros_like(tensor) for key, tensor in load_file(hf / "model.safetensors").items()
    }
    for key, tensor in tensors.items():
        tensor.fill_(next((number for part, number in numbers.items() if part in key), 0))
    found = {}
    for piece, data in to_megatron(tensors, read_model(hf), verify=True):
        if data.any():
            (end,) = (end for end in wanted if piece.key.endswith(end))
            found[end] = data.unique_consecutive().tolist()
    assert found == wanted
