"""Megatron's side: what is refused, which layers have a window, what latent attention asks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megasft.attention.backend import BACKENDS
from megasft.errors import FlagError
from megasft.megatron.core_attention import (
    PackedCoreAttention,
    PackedRow,
    packed_row,
    sliding_window,
)


def config(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    return TransformerConfig(**(sizes | {"attention_dropout": 0.0} | changes))


def core_attention(settings: TransformerConfig, **more: Any) -> PackedCoreAttention:
    groups = SimpleNamespace(cp=None)
    arguments = {"layer_number": 1, "attn_mask_type": None, "attention_type": "self"}
    return PackedCoreAttention(settings, **(arguments | {"pg_collection": groups} | more))


def one_document(tokens: int) -> PackedRow:
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    return packed_row(borders, torch.arange(int(borders[-1])), cp_rank=0, cp_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "--attention-dropout above 0"),
        ({"softmax_type": "learnable"}, r"sinks.*--megasft-attention te"),
        ({"softmax_type": "off-by-one"}, "sinks"),
        ({"apply_query_key_layer_scaling": True}, "--apply-query-key-layer-scaling"),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        core_attention(config(**changes))


def test_transformer_engines_way_to_choose_the_messages_is_refused() -> None:
    with pytest.raises(FlagError, match=r"--cp-comm-type a2a.*--megasft-attention ring"):
        core_attention(config(), cp_comm_type="a2a")


def test_cross_attention_and_unpacked_input_are_refused() -> None:
    with pytest.raises(FlagError, match="attention_type"):
        core_attention(config(), attention_type="cross")
    with pytest.raises(FlagError, match="packed rows"):
        core_attention(config())(*torch.zeros(3, 8, 4, 8))


def test_windows_are_megatrons_layer_by_layer() -> None:
    windowed = {"window_size": (127, 0)}
    assert sliding_window(config(), 1) is None
    assert sliding_window(config(**windowed), 1) == 127
    every_second = config(**windowed, window_attn_skip_freq=2)
    assert [sliding_window(every_second, layer) for layer in (1, 2, 3)] == [127, None, 127]
    listed = config(**windowed, window_attn_skip_freq=[0, 1])
    assert [sliding_window(listed, layer) for layer in (1, 2)] == [None, 127]
    assert sliding_window(config(window_size=(-1, 0)), 1) is None
    assert sliding_window(config(window_size=(0, 0)), 1) == 0, "itself alone, and not everything"


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_layers_window_reaches_the_backend(backend: str, left: int) -> None:
    query, key, value = torch.randn(3, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 4, 16], dtype=torch.int32)
    row = packed_row(borders, torch.arange(int(borders[-1])), cp_rank=0, cp_size=1)
    layer = core_attention(config(window_size=(left, 0)), backend=backend)
    before = layer(query, key, value, packed_seq_params=row)
    value[6] += 1.0

    after = layer(query, key, value, packed_seq_params=row)

    assert before.shape == (16, 4 * 8)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [6, 7, 8][: 1 + left]


def test_scores_are_divided_by_the_root_of_the_head_size_that_the_model_says() -> None:
    """As Megatron's own attention does; 16 is not ``hidden_size / num_attention_heads``."""
    query, key, value = torch.randn(3, 8, 4, 16, generator=torch.Generator().manual_seed(0))
    layer = core_attention(config(kv_channels=16))

    context = layer(query, key, value, packed_seq_params=one_document(8))

    probs = torch.softmax(query[7, 3] @ key[:, 3].T / 4, dim=-1)
    torch.testing.assert_close(context.view(8, 4, 16)[7, 3], probs @ value[:, 3])


def test_multi_latent_attention_brings_its_scale_and_two_head_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, 4, 24, generator=generator)
    value = torch.randn(8, 4, 16, generator=generator)
    # As MultiLatentAttention builds it (megatron-core 0.19.2).
    layer = core_attention(config(), softmax_scale=0.1, k_channels=24, v_channels=16)

    context = layer(query, key, value, packed_seq_params=one_document(8))

    probs = torch.softmax(query[7, 3] @ key[:, 3].T * 0.1, dim=-1)
    torch.testing.assert_close(context.view(8, 4, 16)[7, 3], probs @ value[:, 3])
