"""The truth is float64 throughout, though transformers asks for float32 in many places."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasft.proof import families
from megasft.proof.float64 import strict_float64, widen
from megasft.proof.oracle import mean_loss, router_losses
from megasft.proof.samples import sample

TALK = sample([3, 1, 4, 1, 5, 9, 2, 6], (2, 1), (4, 3))


class Seen(TorchDispatchMode):
    """Counts the operations that yield floats, by dtype and name; autograd's are among them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[torch.dtype, Counter[str]] = {}

    def __torch_dispatch__(
        self,
        op: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.ops.setdefault(leaf.dtype, Counter())[str(op)] += 1
        return result


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_no_operation_of_the_truth_yields_less_than_float64(family: str) -> None:
    model = widen(families.build(family, seed=0))
    with Seen() as seen:
        loss, _ = mean_loss(model, [TALK], objective="turn", dft_alpha=0.5)
        loss.backward()  # type: ignore[no-untyped-call]
        if families.FAMILIES[family].has_experts:
            router_losses(model, [[[1, 2, 3]]], aux_coeff=0.1, z_coeff=0.1).backward()

    assert sum(seen.ops[torch.float64].values()) > 1000
    assert list(seen.ops) == [torch.float64], seen.ops


def test_transformers_alone_computes_some_of_it_in_float32() -> None:
    model = families.build("qwen3", seed=0).double()
    with Seen() as seen:
        model(input_ids=torch.tensor([[1, 2, 3]]))

    assert sum(seen.ops[torch.float32].values()) > 10


def test_rotary_frequencies_are_powers_in_float64_and_weights_keep_their_values() -> None:
    narrow, wide = (families.build("qwen3", seed=0) for _ in range(2))
    widen(wide)

    theta = narrow.config.rope_parameters["rope_theta"]
    exact = theta ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(wide.model.rotary_emb.inv_freq, exact, rtol=1e-15, atol=0)
    assert not torch.equal(narrow.model.rotary_emb.inv_freq.double(), exact)
    for before, after in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(before.double(), after)


def test_the_default_type_is_what_it_was_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), strict_float64():
        assert torch.ones(1).float().dtype == torch.float64
        raise ZeroDivisionError
    assert torch.ones(1).dtype == torch.float32
