from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasft import cpu
from megasft.errors import FlagError
from megasft.training import freeze


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
