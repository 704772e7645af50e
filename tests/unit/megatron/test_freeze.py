from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasft.errors import FlagError
from megasft.megatron import cpu, freeze


class Layer(torch.nn.Module):
    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.linear = torch.nn.Linear(2, 2, bias=False)


class Stage(torch.nn.Module):
    """Shaped like a pipeline stage of Megatron's: local indices, layer numbers from 1."""

    def __init__(self, *layer_numbers: int, embeds: bool = True) -> None:
        super().__init__()
        if embeds:
            self.embedding = torch.nn.Embedding(4, 2)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(map(Layer, layer_numbers))


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cpu.prepare()
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(stage: Stage, **patterns: list[str]) -> list[str]:
    flags = {"megasft_freeze": None, "megasft_train_only": None, "save": None} | patterns
    hook = freeze.hook_of(SimpleNamespace(**flags))
    assert hook is not None
    assert hook([stage]) == [stage]
    return [name for name, p in stage.named_parameters() if p.requires_grad]


def test_without_patterns_nothing_is_hooked() -> None:
    assert freeze.hook_of(SimpleNamespace(megasft_freeze=None, megasft_train_only=None)) is None


def test_layers_are_numbered_as_in_the_whole_model() -> None:
    """The second stage of two has layers 2 and 3, which it calls 0 and 1."""
    stage = Stage(3, 4)
    assert trained(stage, megasft_freeze=[r"layers\.2\."]) == [
        "embedding.weight",
        "decoder.layers.1.linear.weight",
    ]


def test_train_only_freezes_the_rest_and_may_be_taken_back() -> None:
    stage = Stage(1, 2)
    only = trained(stage, megasft_train_only=[r"layers\.1\.", "embedding"])
    assert only == ["embedding.weight", "decoder.layers.1.linear.weight"]
    assert len(trained(stage, megasft_freeze=[r"layers\.1\."])) == 2


def test_a_frozen_embedding_still_starts_a_graph() -> None:
    """Else recomputation gives the layers behind it no gradient, silently."""
    stage = Stage(1)
    trained(stage, megasft_freeze=["embedding"])
    tokens = torch.tensor([1, 2])
    assert stage.embedding(tokens).requires_grad
    with torch.no_grad():
        assert not stage.embedding(tokens).requires_grad
    assert stage.embedding.weight.grad is None


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["linear", "lm_head"], "no parameter's name holds 'lm_head'"),
        (["."], "would train nothing"),
    ],
)
def test_patterns_without_effect_or_measure_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message):
        trained(Stage(1), megasft_freeze=patterns)


def router(balancing: str = "none") -> Any:
    """One of Megatron's own routers with a bias per expert, in a model of nothing else."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    bias = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_bias_update_rate=0.5,
        moe_router_load_balancing_type=balancing,
        **(bias if balancing == "none" else {}),
    )
    world = torch.distributed.group.WORLD
    groups = ProcessGroupCollection()
    for name in ("tp", "cp", "tp_cp", "tp_dp_cp", "dp_cp", "expt_tp", "expt_dp"):
        setattr(groups, name, world)
    return TopKRouter(config, groups)


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        ({"megasft_train_only": ["embedding"]}, False),
        ({"megasft_freeze": [r"router"]}, False),
        ({"megasft_freeze": ["embedding"]}, True),
    ],
)
def test_the_bias_of_experts_stays_with_a_frozen_router(
    patterns: dict[str, list[str]], moved: bool
) -> None:
    """Mirrors ``_update_router_expert_bias`` (megatron-core 0.19.2), which is called here."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    stage = Stage(1)
    stage.router = router()
    trained(stage, **patterns)
    stage.router.local_tokens_per_expert.copy_(torch.tensor([9.0, 0.0, 1.0, 2.0]))
    _update_router_expert_bias([stage], stage.router.config, torch.distributed.group.WORLD)
    bias = stage.router.expert_bias.tolist()
    assert bias == ([-0.5, 0.5, 0.5, 0.5] if moved else [0.0] * 4)


def test_a_bias_that_moves_whatever_is_frozen_is_refused() -> None:
    stage = Stage(1)
    stage.router = router("quantile_balancing")
    with pytest.raises(FlagError, match="quantile_balancing moves the routers' bias"):
        trained(stage, megasft_train_only=["embedding"])
    trained(stage, megasft_freeze=["embedding"])
