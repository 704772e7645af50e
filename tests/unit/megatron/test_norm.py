"""Norms of local layers under sequence parallelism; gradients themselves are tested with ranks."""

from types import SimpleNamespace

import pytest

from megasft.errors import FlagError
from megasft.megatron.norm import NORMS, torch_norm


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_the_weights_of_a_norm_are_marked_for_the_sum_over_tensor_parallel_ranks(
    name: str, sequence_parallel: bool
) -> None:
    """By the attribute that ``finalize_model_grads`` of Megatron 0.19 looks for."""
    config = SimpleNamespace(
        normalization=name,
        layernorm_zero_centered_gamma=False,
        sequence_parallel=sequence_parallel,
    )
    norm = torch_norm(config, 8)
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]
    assert marks == [sequence_parallel] * (2 if name == "LayerNorm" else 1)


def test_a_norm_that_torch_lacks_is_refused() -> None:
    config = SimpleNamespace(normalization="RMSNorm", layernorm_zero_centered_gamma=True)
    with pytest.raises(FlagError, match=r"--apply-layernorm-1p True needs Transformer Engine"):
        torch_norm(config, 8)
