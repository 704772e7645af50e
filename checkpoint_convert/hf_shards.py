"""Writes sharded safetensors tensor by tensor, as transformers would have written them whole.

The safetensors library writes a file from tensors that are all in memory. A shard is gigabytes, and
the format is a header of names, shapes and offsets before the bytes; so the header is written
first and every tensor at its offset when it comes. Order, alignment and names of files are the
library's and transformers': the tests compare whole files with theirs, and read them back through
the library.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import orjson
import torch

from checkpoint_convert.hf_tensors import DTYPES, INDEX

MAX_SHARD_BYTES: Final = 5 * 10**9
"""What published models use."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ORDER: Final = {dtype: i for i, dtype in enumerate(_NAMES)}


def plan_shards(groups: Sequence[Sequence[tuple[str, int]]], *, max_bytes: int) -> list[list[int]]:
    """Deal groups of tensors, in order, to shards of at most ``max_bytes``.

    Args:
        groups: Names and bytes of tensors that come from one piece, and so share a shard.
        max_bytes: A larger group is a shard of its own.

    Returns:
        Indices of groups by shard.
    """
    shards: list[list[int]] = []
    room = -1
    for i, group in enumerate(groups):
        num_bytes = sum(size for _, size in group)
        if num_bytes > room or not shards:
            shards.append([])
            room = max_bytes
        shards[-1].append(i)
        room -= num_bytes
    return shards


def shard_names(num_shards: int) -> list[str]:
    """Return the files' names.

    Example:
        >>> shard_names(1), shard_names(2)[0]
        (['model.safetensors'], 'model-00001-of-00002.safetensors')
    """
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]


def write_index(folder: Path, metas: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Write which shard holds which tensor; a single file needs none.

    Args:
        folder: Where the shards lie.
        metas: Of each shard, tensors by name; only their sizes are used.
    """
    if len(metas) == 1:
        return
    names = shard_names(len(metas))
    total = {"total_parameters": 0, "total_size": 0}
    for meta in metas:
        total["total_parameters"] += sum(tensor.numel() for tensor in meta.values())
        total["total_size"] += sum(tensor.nbytes for tensor in meta.values())
    weight_map = {name: file for file, meta in zip(names, metas, strict=True) for name in meta}
    content = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


class ShardWriter:
    """One safetensors file under way; it gets its name when every tensor is in it.

    Use as a context manager; leaving it by an exception leaves no file of that name.
    """

    def __init__(self, path: Path, metas: Mapping[str, torch.Tensor]) -> None:
        """Write the header.

        Args:
            path: The file's final name.
            metas: By name, tensors of the shapes and dtypes to come.
        """
        self._path = path
        self._partial = path.with_suffix(".partial")
        self._metas = metas
        self._missing = set(metas)
        # The library's order: larger dtypes first, so that all are aligned, then by name.
        order = sorted(metas, key=lambda name: (-_ORDER[metas[name].dtype], name))
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            meta = metas[name]
            self._offsets[name] = end
            header[name] = {
                "dtype": _NAMES[meta.dtype],
                "shape": list(meta.shape),
                "data_offsets": [end, end := end + meta.nbytes],
            }
        written = orjson.dumps(header)
        written += b" " * (-len(written) % 8)
        self._start = 8 + len(written)
        self._file = self._partial.open("wb")
        self._file.write(len(written).to_bytes(8, "little") + written)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in any order.

        Raises:
            ValueError: It is not of the shape and dtype that were announced.
        """
        meta = self._metas[name]
        if tensor.shape != meta.shape or tensor.dtype != meta.dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} {tensor.shape}, not {meta.dtype} {meta.shape}"
            )
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        self._missing.discard(name)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, if all went well."""
        with self._file:
            if kind is not None:
                return
            if self._missing:
                raise ValueError(f"{self._path} lacks {sorted(self._missing)[:3]}")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._partial.rename(self._path)
