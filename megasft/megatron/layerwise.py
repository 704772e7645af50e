"""Megatron's model one layer at a time, each layer given what Hugging Face's layer was given.

For models larger than memory. An error is seen at the layer that makes it, because the next one
starts from the right numbers again; and an expert chosen differently near a tie is one token of one
layer, not the rest of the row. The forward pass is Megatron's own: hooks give a module its weights
when it is about to run, through Megatron's description of its tensors, and take them away behind
it.
"""

import copy
import resource
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megasft.megatron.forward import (
    Case,
    build,
    forward,
    require_loaded,
    round_parameters,
    stored_tensors,
)
from megasft.megatron.layer_weights import give_when_used, without_weights
from megasft.megatron.shard_reader import ShardReader


class Layers(NamedTuple):
    """What a layer's output is off by.

    Attributes:
        errors: Per layer and token, ‖found - wanted‖ / ‖wanted‖ of the hidden state. The first
            entry is the embedding's, entry i + 1 that of layer i.
        peak_bytes: Most memory this process had at any time, libraries included.
    """

    errors: list[list[float]]
    peak_bytes: int


def forward_by_layer(config: Any, case: Case) -> tuple[torch.Tensor, dict[str, Any]]:
    """Compare every layer with Hugging Face's hidden states.

    Args:
        config: Megatron's, of the model.
        case: With the folder of hidden states.

    Returns:
        Logits from Hugging Face's last hidden state, float32 [tokens, vocabulary], and the fields
        of ``Layers``.
    """
    assert case.hidden is not None
    with without_weights():
        model: Any = build(config)
    weights = _Weights(model, case)
    hidden, errors = Path(case.hidden), []
    progress = Path(case.output).with_suffix(".progress")

    def compare(found: torch.Tensor, i: int) -> None:
        wanted = _read(hidden, i)
        difference = (found[:, 0] - wanted).norm(dim=-1)
        errors.append((difference / wanted.norm(dim=-1)).tolist())
        with progress.open("ab") as file:
            file.write(b".")

    def enter(i: int, _: Any, args: Any, kwargs: Any) -> Any:
        if i == 0:
            compare(kwargs["hidden_states"], 0)
        return args, kwargs | {"hidden_states": _read(hidden, i)[:, None]}

    for i, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(partial(enter, i), with_kwargs=True)
        layer.register_forward_hook(lambda _, __, output, i=i: compare(output[0], i + 1))
        give_when_used(layer, weights.give)
    last = len(model.decoder.layers)
    norm = model.decoder.final_layernorm
    norm.register_forward_pre_hook(lambda *_: (_read(hidden, last)[:, None],))
    for module in (model.embedding, norm):
        give_when_used(module, weights.give)
    if model.share_embeddings_and_output_weights:
        # The output layer is handed the embedding's weight, which is looked up behind the norm.
        norm.register_forward_hook(lambda *_: weights.give(model.embedding))
    else:
        give_when_used(model.output_layer, weights.give)
    logits = forward(model, case)
    assert logits is not None
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return logits, Layers(errors, peak_bytes)._asdict()


def _read(folder: Path, i: int) -> torch.Tensor:
    state: torch.Tensor = torch.load(folder / f"{i}.pt", weights_only=True)
    return state


class _Weights:
    """Gives modules their weights, and only these are read from the checkpoint."""

    def __init__(self, model: Any, case: Case) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        self.model, self.case = model, case
        folder = str(Path(case.checkpoint) / case.iteration)
        metadata = dist_checkpointing.load_content_metadata(folder) or {}
        self.sharded = {
            name: entry
            for name, entry in model.sharded_state_dict(metadata=metadata).items()
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        self.names = {id(module): name for name, module in model.named_modules()}
        self.reader = ShardReader(Path(folder))

    def give(self, module: torch.nn.Module) -> None:
        """Load a module's tensors, which are nan before."""
        from megatron.core.dist_checkpointing.dict_utils import (
            dict_list_map_inplace,
            nested_values,
        )
        from megatron.core.dist_checkpointing.mapping import apply_factory_merges
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

        prefix = self.names[id(module)] + "."
        wanted = {n: _with_nan(e) for n, e in self.sharded.items() if n.startswith(prefix)}
        shards, _, factories = load_preprocess(wanted)
        self.reader.fill(nested_values(shards))
        dict_list_map_inplace(lambda shard: shard.data, shards)
        loaded = apply_factory_merges(shards, factories)
        result = self.model.load_state_dict(loaded, strict=False, assign=True)
        assert not result.unexpected_keys, result.unexpected_keys
        found = stored_tensors(self.model)
        require_loaded({n: t for n, t in found.items() if n.startswith(prefix)}, self.case)
        round_parameters(module, self.case)


def _with_nan(entry: Any) -> Any:
    """Return a description of the same piece, of a new tensor that is nan."""
    entry = copy.copy(entry)
    entry.data = torch.full(entry.data.shape, torch.nan, dtype=entry.data.dtype, device="cpu")
    return entry
