"""Torch's norms with the mark sequence parallelism needs, for Megatron's local layer spec.

Under sequence parallelism each tensor-parallel rank normalizes its own part of the tokens, so the
gradients of a norm's weights must be summed over these ranks. Megatron does that for parameters
with the attribute ``sequence_parallel``, which its wrapper of torch's norms does not set (it
refuses the flag instead). Chosen over Apex and Transformer Engine, because a CPU has neither.
"""

from dataclasses import fields
from typing import Any, Final

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megasft.errors import FlagError

NORMS: Final = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


def torch_norm(config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """Build a norm; a ``LayerNormBuilder`` of Megatron's.

    Raises:
        FlagError: The model's norm is none of torch's.
    """
    if config.layernorm_zero_centered_gamma or config.normalization not in NORMS:
        raise FlagError(
            f"--normalization {config.normalization} with --apply-layernorm-1p "
            f"{config.layernorm_zero_centered_gamma} needs Transformer Engine's layers; "
            f"the local ones have {' and '.join(NORMS)}"
        )
    norm: torch.nn.Module = NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def replace_norms(submodules: Any) -> None:
    """Put ``torch_norm`` in the place of Megatron's wrapper, in one level of a layer spec."""
    for field in fields(submodules):
        if getattr(submodules, field.name) is WrappedTorchNorm:
            setattr(submodules, field.name, torch_norm)
