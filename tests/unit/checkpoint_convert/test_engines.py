"""Bridges of others: refused where they are not installed, and as good as our rules where they are.

The real ones need Transformer Engine. Where that and mcore-bridge are installed, with or without a
GPU, the whole road is taken.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoint_convert import engines, hf_to_megatron, megatron_to_hf
from checkpoint_convert.config_map import read_model
from checkpoint_convert.engines.flags import MODEL_FLAGS, model_flags
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.megatron_checkpoint import PieceReader, find_iteration
from checkpoint_convert.pieces import pieces
from checkpoint_convert.rules import same_bits
from megasft.errors import ConversionError
from megasft.run import forward_worker
from tests.unit.checkpoint_convert.tiny_models import save

WORKER = forward_worker.__name__

HAS_BRIDGE = find_spec("mcore_bridge") is not None and find_spec("transformer_engine") is not None


def megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser: argparse.ArgumentParser = add_megatron_arguments(
        argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    )
    return parser


@pytest.mark.skipif(HAS_BRIDGE, reason="mcore-bridge is installed")
def test_a_bridge_that_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save("llama", tmp_path / "hf")
    flags = ["--hf", str(hf), "--output", str(tmp_path / "out"), "--engine", "mcore-bridge"]
    assert hf_to_megatron.main(flags, worker=None) == 1
    assert "pip install mcore-bridge" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [hf]
    with pytest.raises(ConversionError, match="there are: own, mcore-bridge, megatron-bridge"):
        engines.require("swift")


def test_a_bridge_works_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main, source in ((hf_to_megatron.main, "--hf"), (megatron_to_hf.main, "--checkpoint")):
        with pytest.raises(SystemExit):
            main([source, "a", "--output", "b", "--engine", "mcore-bridge"], worker=None)
        assert "start it without torchrun" in capsys.readouterr().err


def test_a_bridges_configuration_becomes_megatrons_flags() -> None:
    """Every name in the table is one that Megatron's parser has: none is lost in silence."""
    parser = megatron_parser()
    known = {action.dest for action in parser._actions}
    assert known.issuperset(MODEL_FLAGS)
    config = SimpleNamespace(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        num_moe_experts=6,
        layernorm_epsilon=1e-6,
        rotary_base=1_000_000.0,
        add_bias_linear=False,
        add_qkv_bias=False,
        swiglu=True,
        moe_layer_freq=[0, 1],
        moe_router_enable_expert_bias=True,
        window_size=(4, 0),
        normalization="RMSNorm",
        attention_dropout=0.1,
        tensor_model_parallel_size=8,
    )
    flags = model_flags(config, parser)
    args = parser.parse_args(flags)
    assert (args.num_layers, args.num_experts, args.num_query_groups) == (2, 6, 2)
    assert args.group_query_attention and args.layernorm_epsilon == 1e-6
    assert args.rotary_base == 1_000_000 and args.swiglu and not args.add_bias_linear
    assert args.moe_layer_freq == [0, 1] and args.window_size == (4, 0)
    assert args.moe_router_bias_update_rate == 0 and args.attention_dropout == 0
    assert args.tensor_model_parallel_size == 1 and "--add-qkv-bias" not in flags


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BRIDGE, reason="mcore-bridge or Transformer Engine is not installed")
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_mcore_bridge_makes_the_checkpoint_that_our_rules_make(tmp_path: Path, name: str) -> None:
    hf = save(name, tmp_path / "hf")
    engine = ["--engine", "mcore-bridge"]
    there = ["--hf", str(hf), "--output", str(tmp_path / "megatron")]
    assert hf_to_megatron.main([*there, *engine], worker=WORKER) == 0
    hf_to_megatron.convert(hf, tmp_path / "own")
    ours, theirs = (
        PieceReader(find_iteration(tmp_path / folder, iteration=None))
        for folder in ("own", "megatron")
    )
    assert set(ours.keys) == set(theirs.keys)
    assert all(same_bits(ours.read(p), theirs.read(p)) for p in pieces(read_model(hf)))
    back = ["--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "back")]
    assert megatron_to_hf.main([*back, "--like", str(hf), *engine], worker=WORKER) == 0
    before, after = HFTensors(hf), HFTensors(tmp_path / "back")
    assert set(before) == set(after) and all(same_bits(before[n], after[n]) for n in before)
