"""Hugging Face's own model on the row: whole, or with one layer of it in memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.tensor_map import EMBEDDING, OUTPUT
from checkpoint_convert.verify.text import Row
from megasft.megatron.layer_weights import give_when_used, without_weights

NUDGE: Final = 1e-6
"""Relative size of a change of a layer's input as rounding makes them: a few times what two
programs are found to differ by behind a layer."""

NUM_NUDGES: Final = 3

LAYER_TOLERANCE: Final = 2e-5
"""What a layer's output may be off by, of the norm of a token's hidden state, when its input is
right. Measured: 2e-7 to 1.5e-6, whatever the model's depth. A nudge grows up to tenfold in a layer
whose experts stay the same (measured), and jumps to 1e-2 and more where they change."""

Forward = Callable[[], Any]


def read_config(folder: Path) -> Any:
    """Return the configuration as transformers understands it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def logits(folder: Path, row: Row) -> torch.Tensor:
    """Run the whole model in float32; return float32 [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    found = row.flat(_run(model, row))
    del model
    gc.collect()
    return found


def logits_by_layer(
    folder: Path, row: Row, *, hidden: Path, done: Callable[[], None]
) -> torch.Tensor:
    """Run the model in float32 with the weights of one layer in memory.

    Args:
        folder: Hugging Face folder.
        row: Tokens.
        hidden: Folder for what the other side needs: ``I.pt`` is the input of layer I, float32
            [tokens, hidden], of the norm behind the last layer for I = layers; and ``I.near.pt``
            are the tokens, bool [tokens], for which the layer itself is not sure of its experts.
        done: Called after every layer.

    Returns:
        float32 [tokens, vocabulary].
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    with without_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    weights = _Weights(model, HFTensors(folder))
    layers = model.base_model.layers

    def enter(i: int, _: Any, args: Any, kwargs: Any) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        torch.save(row.flat(state), hidden / f"{i}.pt")

    def leave(i: int, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        near = _near_a_tie(layer, args, kwargs, output)
        torch.save(row.flat(near), hidden / f"{i}.near.pt")
        done()

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(enter, i), with_kwargs=True)
        layer.register_forward_hook(partial(leave, i), with_kwargs=True)
        give_when_used(layer, lambda _, i=i: weights.give_layer(i))  # type: ignore[misc]
    for name, module in model.named_modules():
        is_outside = not any(module is part for layer in layers for part in layer.modules())
        if is_outside and any(True for _ in module.named_parameters(recurse=False)):
            give_when_used(module, partial(weights.give, name=name))
    model.base_model.norm.register_forward_pre_hook(
        lambda _, args: torch.save(row.flat(args[0]), hidden / f"{len(layers)}.pt")
    )
    return row.flat(_run(model, row))


class _Weights:
    """Gives modules their weights, read from a folder."""

    def __init__(self, model: Any, tensors: HFTensors) -> None:
        self.model, self.tensors = model, tensors
        self.prefix = f"{model.base_model_prefix}.layers."

    def give_layer(self, i: int) -> None:
        """Load a layer as transformers does, which knows how a file's experts become one tensor."""
        names = [n for n in self.tensors.names if n.startswith(f"{self.prefix}{i}.")]
        _load(self.model, {name: self.tensors[name] for name in names})

    def give(self, module: torch.nn.Module, name: str) -> None:
        """Load a module outside of the layers."""
        for own, parameter in list(module.named_parameters(recurse=False)):
            stored = f"{name}.{own}"
            if stored == OUTPUT and stored not in self.tensors:
                stored = EMBEDDING
            module.register_parameter(
                own,
                torch.nn.Parameter(self.tensors[stored].to(parameter.dtype), requires_grad=False),
            )


def _load(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError:  # release 4 has no tensors but those of the file
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        model.load_state_dict(wide, strict=False, assign=True)
        return
    settings = LoadStateDictConfig(
        dtype=torch.float32, weight_mapping=get_model_conversion_mapping(model)
    )
    with _quiet():
        convert_and_load_state_dict_in_model(model, tensors, settings)


def _near_a_tie(layer: Any, args: Any, kwargs: Any, output: Any) -> torch.Tensor:
    """Return for which tokens a change of the size of rounding changes the output much more.

    Experts are chosen, so two programs that round differently may choose differently, and both are
    right. Families differ in how they choose; whether a layer is unsure is seen from outside.

    Returns:
        bool [documents, longest].
    """
    wanted = _hidden(output)
    near = torch.zeros(wanted.shape[:2], dtype=torch.bool)
    if not any("expert" in name for name, _ in layer.named_parameters()):
        return near
    args, kwargs = list(args), dict(kwargs)
    state = args[0] if args else kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_NUDGES):
        noise = torch.randn(state.shape, generator=generator)
        nudged = state + noise * NUDGE * state.norm(dim=-1, keepdim=True) / state.shape[-1] ** 0.5
        if args:
            args[0] = nudged
        else:
            kwargs["hidden_states"] = nudged
        found = _hidden(layer.forward(*args, **kwargs))
        change = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        near |= change > LAYER_TOLERANCE
    return near


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _run(model: Any, row: Row) -> torch.Tensor:
    # Behind a document's end there is padding, which a causal model never looks at.
    with torch.no_grad():
        found: torch.Tensor = model(row.padded(), use_cache=False).logits
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a progress bar per layer."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
