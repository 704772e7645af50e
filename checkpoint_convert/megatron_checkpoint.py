"""Reads a Megatron ``torch_dist`` checkpoint, piece by piece.

Whatever layout a run had, its checkpoint holds global tensors: where layers are alike the layer is
the first axis, and routed experts are the next. A piece is read by torch's checkpoint loader, which
puts it together from what the ranks wrote. The optimizer's state, many times as large, stays on
disk.
"""

import warnings
from pathlib import Path
from typing import Final

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint_convert.pieces import Piece
from megasft.compat import require_megatron
from megasft.errors import ConversionError
from megasft.megatron.shard_reader import ShardReader

TRACKER: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
"""What Megatron calls a checkpoint that no iteration has made: it starts at 0, without optimizer
and without random state, whether given as ``--pretrained-checkpoint`` or as ``--load``."""


def import_megatron() -> None:
    """Import Megatron's checkpointing without its warnings, that Apex is absent for one.

    Raises:
        MissingPackageError: Megatron is missing, or of another release.
    """
    require_megatron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401


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


class PieceReader:
    """A checkpoint's model, read piece by piece as whole tensors on the CPU.

    Attributes:
        keys: Names of the model's tensors; the optimizer's are left out.

    Example:
        >>> reader = PieceReader(find_iteration(Path("run"), iteration=None))
        >>> reader.read(pieces(model)[0]).shape
        torch.Size([151936, 1024])
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Args:
            folder: One iteration, as ``find_iteration`` returns it.

        Raises:
            ConversionError: The metadata cannot be read, or a file it names is missing or cut off.
        """
        import_megatron()  # the metadata file may name its classes
        try:
            self._reader = ShardReader(folder)
        except Exception as error:  # whatever a broken pickle raises
            raise ConversionError(
                f"{folder / '.metadata'} cannot be read ({error!r}); take another --iteration"
            ) from error
        _require_files(folder, self._reader.everything)
        self._entries = {
            key: entry
            for key, entry in self._reader.everything.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _is_training_state(key)
        }

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the model's tensors."""
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a global tensor, leading axes included."""
        return tuple(self._entries[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._entries[key].properties.dtype

    def meta(self, piece: Piece) -> torch.Tensor:
        """Return a piece without content, on torch's meta device."""
        shape = self.shape(piece.key)[len(piece.axes) :]
        return torch.empty(shape, dtype=self.dtype(piece.key), device="meta")

    def read(self, piece: Piece) -> torch.Tensor:
        """Read one piece, without the leading axes."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        entry = self._entries[piece.key]
        num_axes = len(piece.axes)
        shape = (*(1 for _ in piece.axes), *entry.size[num_axes:])
        data = torch.empty(shape, dtype=entry.properties.dtype)
        offsets = [(i, *at) for i, at in enumerate(zip(piece.place, piece.axes, strict=True))]
        self._reader.fill([ShardedTensor.from_rank_offsets(piece.key, data, *offsets)])
        return data[(0,) * num_axes]


def _require_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            fact = "is missing" if size is None else f"has {size:,} of {end:,} bytes"
            raise ConversionError(
                f"{path} {fact}; copy the checkpoint again, or take another --iteration"
            )


def _is_training_state(key: str) -> bool:
    return any(
        part.startswith(("optimizer", "rng_state", "rerun_state")) for part in key.split(".")
    )
