import argparse
from pathlib import Path
from typing import Any

import orjson
import pytest

from checkpoint_convert.config_map import read_model
from megasft.errors import FlagError
from megasft.packing.balance import LLAMA_8B
from megasft.packing.forecast_cost import read_cost
from megasft.training.row_order import cost_of
from tests.unit.checkpoint_convert import published

SIZES = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "kv-channels"),
    *("num-query-groups", "num-experts", "moe-router-topk", "moe-ffn-hidden-size"),
    *("moe-shared-expert-intermediate-size", "padded-vocab-size"),
)


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return folder


def flags_of(folder: Path) -> argparse.Namespace:
    """What Megatron parses of the flags that the conversion writes."""
    parser = argparse.ArgumentParser()
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int)
    for name in ("group-query-attention", "swiglu"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_known_args(list(read_model(folder).flags))[0]


@pytest.mark.parametrize(
    "name", ["LLAMA_2_7B", "QWEN3_0_6B", "QWEN3_30B_A3B", "MIXTRAL_8X7B", "DEEPSEEK_V3_BF16"]
)
def test_a_configuration_costs_what_training_counts_from_its_flags(
    name: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, getattr(published, name))
    assert read_cost(folder) == cost_of(flags_of(folder))


def test_the_model_taken_where_none_is_known_is_llama_3_8b(tmp_path: Path) -> None:
    assert read_cost(write(tmp_path, published.LLAMA_3_8B)) == LLAMA_8B
    nested = {"model_type": "some_vision_model", "text_config": published.LLAMA_3_8B}
    assert read_cost(write(tmp_path, nested)) == LLAMA_8B


def test_shared_experts_are_met_by_every_token(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 6, "moe_intermediate_size": 14_336 // 8}
    for shared in ({"shared_expert_intermediate_size": 14_336 // 4}, {"n_shared_experts": 2}):
        assert read_cost(write(tmp_path, published.LLAMA_3_8B | experts | shared)) == LLAMA_8B


def test_a_folder_without_what_is_needed_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"config\.json cannot be read .* name the Hugging Face"):
        read_cost(tmp_path)
    config = {k: v for k, v in published.LLAMA_3_8B.items() if k != "vocab_size"}
    with pytest.raises(FlagError, match="has no vocab_size, which the cost"):
        read_cost(write(tmp_path, config))
