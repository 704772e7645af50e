"""Reads the tensors of a ``torch_dist`` checkpoint that Megatron describes, and nothing else of it.

Megatron's own loader (0.19.2, ``TorchDistLoadShardedStrategy``) is not used: a process alone must
ask it for every layer of a tensor at once, and torch looks through the chunks of all layers for
each expert. Here torch's loader is shown the chunks that lie on the layers which are wanted.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from megasft.errors import ConversionError


class ShardReader(FileSystemReader):
    """Fills Megatron's ``ShardedTensor`` from one iteration of a checkpoint.

    Attributes:
        everything: Metadata of the whole checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.everything = self._shown = super().read_metadata()
        self._at: dict[str, dict[tuple[int, int], list[ChunkStorageMetadata]]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what torch's loader is to see."""
        return self._shown

    def fill(self, shards: Iterable[Any]) -> None:
        """Read into the tensors of ``ShardedTensor``.

        Raises:
            ConversionError: The checkpoint has no such tensor, or one of another shape.
        """
        from megatron.core.dist_checkpointing.strategies.checkpointable import (
            CheckpointableShardedTensor,
            LocalShardsContainer,
        )

        by_key: dict[str, list[Any]] = {}
        for shard in shards:
            # Torch knows no axes before a tensor's own (layers, experts): here they have length 1.
            shape = (*(1,) * shard.prepend_axis_num, *shard.local_shape)
            whole = replace(
                shard, data=shard.data.view(shape), local_shape=shape, prepend_axis_num=0
            )
            by_key.setdefault(shard.key, []).append(whole)
        self._shown = Metadata(
            {key: self._entry(key, wanted) for key, wanted in by_key.items()},
            storage_data=self.everything.storage_data,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is not a distributed run
            load(
                {
                    key: LocalShardsContainer([*map(CheckpointableShardedTensor.from_sh_ten, of)])
                    for key, of in by_key.items()
                },
                storage_reader=self,
                no_dist=True,
            )

    def _entry(self, key: str, wanted: list[Any]) -> TensorStorageMetadata:
        """Return a tensor's metadata, with the chunks at these places of the first axis alone."""
        entry = self.everything.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ConversionError(
                f"{self.path} has no tensor {key}, which Megatron's model asks for"
            )
        if tuple(entry.size) != tuple(wanted[0].global_shape):
            raise ConversionError(
                f"{key} is {tuple(entry.size)} in {self.path}, and Megatron's model asks for "
                f"{tuple(wanted[0].global_shape)}"
            )
        if key not in self._at:
            # (start, size) on the first axis -> chunks: a few, where layers have many experts.
            self._at[key] = {}
            for chunk in entry.chunks:
                place = (chunk.offsets[0], chunk.sizes[0])
                self._at[key].setdefault(place, []).append(chunk)
        spans = {(w.global_offset[0], w.local_shape[0]) for w in wanted}
        chunks = [
            chunk
            for (start, size), there in self._at[key].items()
            if any(start < at + length and at < start + size for at, length in spans)
            for chunk in there
        ]
        return TensorStorageMetadata(entry.properties, entry.size, chunks)
