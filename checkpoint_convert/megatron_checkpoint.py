"""A Megatron ``torch_dist`` checkpoint: write one from whole tensors, read the model's out of one.

Tensors are written as global tensors, in the layout that ``GPTModel.sharded_state_dict()`` asks
for: when layers are alike the layer is the first axis, one chunk each; when some are dense and
others have experts, every layer has keys of its own. Nothing in it depends on a parallel layout, so
any run loads it at its own. A run pads the vocabulary of what it loads with rows of zeros; see
``config_map`` for why ours does not.

Writing goes through torch's checkpoint writer with Megatron's planner and tensor classes, not
through ``dist_checkpointing.save``. That starts a helper process that imports ``__main__`` again,
calls ``torch.cuda.synchronize`` and needs a process group; a conversion has no use for any of them.
The price is that ``metadata.json`` and ``common_state`` are written here; the test that loads a
converted checkpoint into Megatron's model, through ``dist_checkpointing.load``, holds it together.
"""

import io
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoint_convert.config_map import Model
from checkpoint_convert.families import FAMILIES, ROUTED_MODULES
from checkpoint_convert.tensor_map import PlacedTensor
from megasft.compat import require_megatron
from megasft.errors import ConversionError

TRACKER: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
"""What Megatron calls a checkpoint that no iteration has made: it starts at 0, without optimizer
and without random state, whether given as ``--pretrained-checkpoint`` or as ``--load``."""

CONTENT_METADATA: Final = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What Megatron 0.19.2 saves for a model. The loading run builds its own keys from it, and these
values mean a layer axis instead of a key per layer, where layers are alike: the form that loads at
any pipeline size."""


def write(folder: Path, tensors: Sequence[PlacedTensor], model: Model) -> None:
    """Write a checkpoint with its tracker file.

    Args:
        folder: Exists; what ``--pretrained-checkpoint`` will name.
        tensors: All of the model's.
        model: Sizes, for the layer axis and the arguments Megatron compares.
    """
    require_megatron()
    release = folder / RELEASE
    release.mkdir()
    with warnings.catch_warnings():
        # That Apex is absent, and that one process is not a distributed run.
        warnings.simplefilter("ignore")
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
        from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

        save(
            {**_sharded(tensors, model), **_objects(model)},
            storage_writer=FileSystemWriter(release),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    # Megatron takes a folder for a checkpoint by this file, so it is written last.
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    (folder / TRACKER).write_text(RELEASE)


def _sharded(tensors: Sequence[PlacedTensor], model: Model) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.checkpointable import (
        CheckpointableShardedTensor,
        LocalShardsContainer,
    )

    shards: dict[str, list[Any]] = {}
    for piece, data in tensors:
        offsets = [(i, *at) for i, at in enumerate(zip(piece.place, piece.axes, strict=True))]
        shard = ShardedTensor.from_rank_offsets(
            piece.key, data[(None,) * len(piece.axes)], *offsets
        )
        shards.setdefault(piece.key, []).append(CheckpointableShardedTensor.from_sh_ten(shard))
    return {
        key: LocalShardsContainer(pieces) if len(pieces) > 1 else pieces[0]
        for key, pieces in shards.items()
    }


def _objects(model: Model) -> dict[str, io.BytesIO]:
    """Return what is not a tensor: the common state, and the modules' empty extra states.

    Both layer specs ask for an extra state per module and fail without. It holds FP8 scales, so
    there is none here, and every module takes None for an answer.
    """
    arguments = Namespace(
        # Compared by Megatron when the checkpoint is given as --load.
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads.num_heads,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    common = {
        "args": arguments,
        # Below 2.0, which is what an absent version means, Megatron would reorder linear_qkv.
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": CONTENT_METADATA,
    }
    objects: dict[str, Any] = {"common_state/shard_0_1": common}
    objects |= dict.fromkeys(_extra_state_keys(model))
    return {key: _packed(value) for key, value in objects.items()}


def _extra_state_keys(model: Model) -> Iterator[str]:
    """Yield the names of the modules' extra states: ``.../shard_<place>_<size>`` by axis."""
    family = FAMILIES[model.family_name]
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    for layer in range(model.num_layers):
        is_sparse = bool(model.is_sparse) and model.is_sparse[layer]
        if model.has_layer_axis:
            prefix, place, size = "decoder.layers", [layer], [model.num_layers]
        else:
            prefix, place, size = f"decoder.layers.{layer}", [], []
        for module in family.layer_modules(is_sparse=is_sparse):
            shard = _shard(place or [0], size or [1])
            yield f"{prefix}.{module}._extra_state/{shard}"
        for module, expert in product(ROUTED_MODULES, range(model.num_experts if is_sparse else 0)):
            shard = _shard([*place, expert], [*size, model.num_experts])
            yield f"{prefix}.{module}._extra_state/{shard}"


def _shard(place: list[int], size: list[int]) -> str:
    return f"shard_{'.'.join(map(str, place))}_{'.'.join(map(str, size))}"


def _packed(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer


def find_iteration(checkpoint: Path, *, iteration: int | None) -> Path:
    """Return the folder of one iteration, the latest when none is named.

    Raises:
        ConversionError: There is none, or it was not written to the end.
    """
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    else:
        tracker = checkpoint / TRACKER
        if not tracker.is_file():
            raise ConversionError(
                f"{checkpoint} has no {TRACKER}; give the folder that --save named, not an "
                "iteration in it"
            )
        latest = tracker.read_text().strip()
        name = latest if latest == RELEASE else f"iter_{int(latest):07d}"
    folder = checkpoint / name
    there = sorted(path.name for path in checkpoint.glob("iter_*"))
    if not folder.is_dir():
        raise ConversionError(f"{folder} does not exist; there are: {', '.join(there) or 'none'}")
    absent = [file for file in (".metadata", "metadata.json") if not (folder / file).is_file()]
    if absent:
        raise ConversionError(
            f"{folder} has no {' and no '.join(absent)}: it is not of the format torch_dist, or "
            "its writer died before the end; take another --iteration of: "
            f"{', '.join(n for n in there if n != name) or 'none'}"
        )
    return folder


def read_model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint but the optimizer's, as whole tensors on the CPU.

    Args:
        folder: One iteration, as ``find_iteration`` returns it.
    """
    require_megatron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The metadata file may name classes of Megatron's.
        import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401

        reader = FileSystemReader(folder)
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _is_training_state(key)
        }
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _is_training_state(key: str) -> bool:
    return any(
        part.startswith(("optimizer", "rng_state", "rerun_state")) for part in key.split(".")
    )
