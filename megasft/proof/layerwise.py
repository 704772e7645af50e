"""Megatron's model one layer at a time, each layer given what Hugging Face's layer was given.

For models larger than memory. An error is seen at the layer that makes it, because the next one
starts from the right numbers again; and an expert chosen differently near a tie is one token of one
layer, not the rest of the row. The forward pass is Megatron's own: hooks give a module its weights
when it is about to run, through Megatron's description of its tensors, and take them away behind
it.
"""

import copy
import resource
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from checkpoint_convert.verify.empty import take_weights, without_weights
from megasft.errors import ConversionError
from megasft.proof.forward import (
    Case,
    build,
    forward,
    require_loaded,
    round_parameters,
    stored_tensors,
)


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

    def enter(i: int) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any) -> Any:
            if i == 0:
                compare(kwargs["hidden_states"], 0)
            weights.give(layer)
            return args, kwargs | {"hidden_states": _read(hidden, i)[:, None]}

        return hook

    def leave(i: int) -> Any:
        def hook(layer: Any, args: Any, output: Any) -> None:
            compare(output[0], i + 1)
            take_weights(layer)

        return hook

    for i, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(enter(i), with_kwargs=True)
        layer.register_forward_hook(leave(i))
    weights.give_when_used(model.embedding)
    last = len(model.decoder.layers)
    norm = model.decoder.final_layernorm
    norm.register_forward_pre_hook(lambda _, __: (_read(hidden, last)[:, None],))
    weights.give_when_used(norm)
    if model.share_embeddings_and_output_weights:
        # The output layer is handed the embedding's weight, which is looked up behind the norm.
        norm.register_forward_hook(lambda *_: weights.give(model.embedding))
    else:
        weights.give_when_used(model.output_layer)
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
        self.reader = _LayerReader(folder)

    def give(self, module: torch.nn.Module) -> None:
        """Load a module's tensors, which are nan before."""
        prefix = self.names[id(module)] + "."
        entries = {name: e for name, e in self.sharded.items() if name.startswith(prefix)}
        loaded = self.reader.load({name: _with_nan(entry) for name, entry in entries.items()})
        result = self.model.load_state_dict(loaded, strict=False, assign=True)
        assert not result.unexpected_keys, result.unexpected_keys
        found = stored_tensors(self.model)
        require_loaded({n: t for n, t in found.items() if n.startswith(prefix)}, self.case)
        round_parameters(module, self.case)

    def give_when_used(self, module: torch.nn.Module) -> None:
        """Load a module's tensors when it runs, and let them go behind it."""
        module.register_forward_pre_hook(lambda m, _: self.give(m))
        module.register_forward_hook(lambda m, *_: take_weights(m))


def _with_nan(entry: Any) -> Any:
    """Return a description of the same piece, of a new tensor that is nan."""
    entry = copy.copy(entry)
    entry.data = torch.full(entry.data.shape, torch.nan, dtype=entry.data.dtype, device="cpu")
    return entry


class _LayerReader(FileSystemReader):
    """Reads pieces that Megatron describes, with torch's checkpoint loader.

    Megatron's own loader (0.19.2, ``TorchDistLoadShardedStrategy``) is one call away from this and
    not used: a process alone must ask it for every layer of a tensor at once, and it looks through
    the chunks of all layers for each expert. Description and factories are Megatron's.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.everything = super().read_metadata()
        self.wanted = self.everything

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what is known of the tensors being read."""
        return self.wanted

    def load(self, described: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Fill tensors in place, and put together what Megatron stores in parts.

        Args:
            described: Megatron's sharded tensors and factories, by name in the model.

        Raises:
            ConversionError: The checkpoint has no such tensor.
        """
        from megatron.core.dist_checkpointing.dict_utils import (
            dict_list_map_inplace,
            nested_values,
        )
        from megatron.core.dist_checkpointing.mapping import apply_factory_merges
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
        from megatron.core.dist_checkpointing.strategies.checkpointable import (
            CheckpointableShardedTensor,
            LocalShardsContainer,
        )

        pieces, _, factories = load_preprocess(described)
        by_key: dict[str, list[Any]] = {}
        for piece in nested_values(pieces):
            ones = (1,) * piece.prepend_axis_num
            shape = (*ones, *piece.local_shape)
            whole = replace(
                piece, data=piece.data.view(shape), local_shape=shape, prepend_axis_num=0
            )
            by_key.setdefault(piece.key, []).append(CheckpointableShardedTensor.from_sh_ten(whole))
        self.wanted = Metadata(
            {key: self._chunks(key, shards) for key, shards in by_key.items()},
            storage_data=self.everything.storage_data,
        )
        shards = {key: LocalShardsContainer(shards) for key, shards in by_key.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is not a distributed run
            load(shards, storage_reader=self, no_dist=True)
        dict_list_map_inplace(lambda piece: piece.data, pieces)
        loaded: dict[str, torch.Tensor] = apply_factory_merges(pieces, factories)
        return loaded

    def _chunks(self, key: str, shards: list[Any]) -> TensorStorageMetadata:
        """Return a tensor's chunks that lie where these pieces do on the first axis."""
        entry = self.everything.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ConversionError(
                f"{self.path} has no tensor {key}, which Megatron's model asks for"
            )
        wanted = shards[0]._sh_ten
        if tuple(entry.size) != tuple(wanted.global_shape):
            raise ConversionError(
                f"{key} is {tuple(entry.size)} in {self.path}, and Megatron's model asks for "
                f"{tuple(wanted.global_shape)}"
            )
        first = {s._sh_ten.global_offset[0] for s in shards}
        size = wanted.local_shape[0]
        chunks = [
            chunk
            for chunk in entry.chunks
            if any(
                chunk.offsets[0] < at + size and at < chunk.offsets[0] + chunk.sizes[0]
                for at in first
            )
        ]
        return TensorStorageMetadata(entry.properties, entry.size, chunks)
