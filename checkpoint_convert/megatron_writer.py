"""Writes a Megatron ``torch_dist`` checkpoint from pieces, in units that survive an interruption.

Tensors are written as global tensors, in the layout that ``GPTModel.sharded_state_dict()`` asks
for: when layers are alike the layer is the first axis, one chunk each; when some are dense and
others have experts, every layer has keys of its own. Nothing in it depends on a parallel layout, so
any run loads it at its own. A run pads the vocabulary of what it loads with rows of zeros; see
``config_map`` for why ours does not.

Writing goes through torch's checkpoint writer with Megatron's planner and tensor classes, not
through ``dist_checkpointing.save``. That wants the whole model in memory, starts a helper process
that imports ``__main__`` again, calls ``torch.cuda.synchronize`` and needs a process group. Here a
*unit*, some consecutive pieces, takes the place that a rank has there: all of the plan follows from
shapes, so every process makes the same one without a word, writes its own units, makes each tensor
when its turn comes, and leaves a receipt. The receipts become the checkpoint's metadata; a unit
with a receipt is not written again. The price is that ``metadata.json`` and ``common_state`` are
written here; the test that loads a converted checkpoint into Megatron's model, through
``dist_checkpointing.load``, holds it together.
"""

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from checkpoint_convert.config_map import Model
from checkpoint_convert.families import FAMILIES, ROUTED_MODULES
from checkpoint_convert.megatron_checkpoint import RELEASE, TRACKER, import_megatron
from checkpoint_convert.pieces import Piece

UNIT_BYTES: Final = 256 * 2**20
"""Of one unit, unless a single piece is larger: what an interruption costs."""

CONTENT_METADATA: Final = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What Megatron 0.19.2 saves for a model. The loading run builds its own keys from it, and these
values mean a layer axis instead of a key per layer, where layers are alike: the form that loads at
any pipeline size."""

MakePiece = Callable[[Piece], torch.Tensor]
"""Returns a piece's content without the leading axes."""


def units(sized: Sequence[tuple[Piece, int]]) -> list[tuple[Piece, ...]]:
    """Group consecutive pieces into units of at most ``UNIT_BYTES``, or of one larger piece.

    Args:
        sized: Pieces and their bytes.
    """
    found: list[list[Piece]] = []
    room = 0
    for piece, num_bytes in sized:
        if num_bytes > room or not found:
            found.append([])
            room = UNIT_BYTES
        found[-1].append(piece)
        room -= num_bytes
    return [tuple(unit) for unit in found]


class CheckpointWriter:
    """A checkpoint under way.

    Attributes:
        num_units: How many there are; the last holds what is not a tensor.
    """

    def __init__(self, folder: Path, metas: Sequence[tuple[Piece, torch.Tensor]], model: Model):
        """Plan the whole checkpoint.

        Args:
            folder: What ``--pretrained-checkpoint`` will name, under its temporary name.
            metas: Every piece, and a tensor of its shape and dtype without content.
            model: Sizes, for the arguments Megatron compares.
        """
        import_megatron()
        self._folder = folder
        self._release = folder / RELEASE
        self._receipts = folder / "receipts"
        shapes = {(piece.key, piece.place): meta for piece, meta in metas}
        grouped = units([(piece, meta.nbytes) for piece, meta in metas])
        self._pieces = {
            (piece.key, torch.Size(_offset(piece, shapes[piece.key, piece.place]))): piece
            for piece, _ in metas
        }
        states = [_sharded([(p, shapes[p.key, p.place]) for p in unit]) for unit in grouped]
        self._objects = _objects(model)
        self._plans, self._metadata = _plan([*states, self._objects])
        self.num_units = len(self._plans)

    def prepare(self) -> None:
        """Make the folders; one process does."""
        self._release.mkdir(parents=True, exist_ok=True)
        self._receipts.mkdir(exist_ok=True)

    def unit_bytes(self, unit: int) -> int:
        """Return the size of a unit's tensors."""
        return sum(
            item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            for item in self._plans[unit].items
            if item.tensor_data is not None
        )

    def is_written(self, unit: int) -> bool:
        """Say whether a unit has a receipt, and its file is as long as that says."""
        path = self._receipt(unit)
        if not path.is_file():
            return False
        results = pickle.loads(path.read_bytes())
        for result in results:
            info = result.storage_data
            file = self._release / info.relative_path
            if not file.is_file() or file.stat().st_size < info.offset + info.length:
                return False
        return True

    def write(self, unit: int, make: MakePiece) -> None:
        """Write a unit and its receipt, tensor by tensor.

        Raises:
            OSError: The disk is full, for one.
        """
        planner = _planner()
        planner.resolve_data = lambda item: self._content(item, make)
        writer = FileSystemWriter(self._release, per_thread_copy_ahead=0)
        try:
            results: list[WriteResult] = writer.write_data(self._plans[unit], planner).wait()
        except RuntimeError as error:
            # What torch makes of a full disk.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        temporary = self._receipt(unit).with_suffix(".partial")
        with temporary.open("wb") as file:
            pickle.dump(results, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._receipt(unit))

    def finish(self) -> None:
        """Make the checkpoint whole, when every unit is written; one process does."""
        results = [pickle.loads(self._receipt(unit).read_bytes()) for unit in range(self.num_units)]
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        FileSystemWriter(self._release).finish(self._metadata, results)
        # Megatron takes a folder for a checkpoint by this file, so it is written last.
        save_config(CheckpointingConfig("torch_dist", 1), str(self._release))
        (self._folder / TRACKER).write_text(RELEASE)

    def forget_receipts(self) -> None:
        """Remove what only an interrupted conversion needs."""
        for path in self._receipts.iterdir():
            path.unlink()
        self._receipts.rmdir()

    def _content(self, item: Any, make: MakePiece) -> Any:
        index: MetadataIndex = item.index
        if index.fqn in self._objects:
            return self._objects[index.fqn]
        piece = self._pieces[index.fqn, torch.Size(index.offset or ())]
        return make(piece)[(None,) * len(piece.axes)]

    def _receipt(self, unit: int) -> Path:
        return self._receipts / f"{unit:06d}"


def _planner() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    return MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _plan(states: Sequence[dict[str, Any]]) -> tuple[list[SavePlan], Metadata]:
    """Plan as if every unit were a rank of its own."""
    locals_ = []
    for state in states:
        planner = _planner()
        planner.set_up_planner(state)
        locals_.append(planner.create_local_plan())
    # Without the planner's own check that no chunks overlap, which compares all pairs: minutes for
    # hundreds of experts. Places on an axis cannot.
    plans, metadata = create_default_global_save_plan(locals_)
    return FileSystemWriter("").prepare_global_plan(plans), metadata


def _sharded(metas: Sequence[tuple[Piece, torch.Tensor]]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.strategies.checkpointable import (
        CheckpointableShardedTensor,
        LocalShardsContainer,
    )

    shards: dict[str, list[Any]] = {}
    for piece, meta in metas:
        shard = CheckpointableShardedTensor.from_sh_ten(_shard_of(piece, meta))
        shards.setdefault(piece.key, []).append(shard)
    return {
        key: LocalShardsContainer(several) if len(several) > 1 else several[0]
        for key, several in shards.items()
    }


def _shard_of(piece: Piece, meta: torch.Tensor) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    offsets = [(i, *at) for i, at in enumerate(zip(piece.place, piece.axes, strict=True))]
    return ShardedTensor.from_rank_offsets(piece.key, meta[(None,) * len(piece.axes)], *offsets)


def _offset(piece: Piece, meta: torch.Tensor) -> tuple[int, ...]:
    return (*piece.place, *(0 for _ in meta.shape))


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
    # One buffer for all of them: packing costs more than anything else in the plan.
    states = dict.fromkeys(_extra_state_keys(model), _packed(None))
    return {"common_state/shard_0_1": _packed(common), **states}


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
