"""Makes a Hugging Face model compute in float64 throughout, whatever its code casts to.

transformers computes norms, softmax, rotary angles and router logits in float32 even when the model
is float64, which costs a gradient 5e-7 to 1.2e-6. So a mode of torch's own (``TorchFunctionMode``)
reads each request for float32 as one for float64, in every family alike. Rejected: copies of the
modules in question, which would have to follow each release of the library.

The definition of rotary frequencies is ``theta ** (-2 i / d)`` in float64. Megatron and
transformers keep them in float32, so their rounding (8e-8 of a gradient) is an error of the run
that is judged, like any other of float32, and not of the truth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def widen(model: Any) -> Any:
    """Turn a float32 model into a float64 one, in place; its rotary frequencies are computed again.

    Args:
        model: Hugging Face model; parameters keep their values exactly.
    """
    model.double()
    with strict_float64():
        for module in model.modules():
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = type(module.rotary_emb)(config=model.config)
    return model


@contextmanager
def strict_float64() -> Iterator[None]:
    """Compute in float64 where the code inside asks for float32, or for nothing."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widened(TorchFunctionMode):
    """Reads float32 as float64 in the arguments of every function of torch."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
