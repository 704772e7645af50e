"""The tensors of a Hugging Face folder, memory-mapped and read one at a time.

A file is opened for a few tensors and let go again: the pages of a mapping count as the process's
memory for as long as it lives, and a model is larger than that. What names, shapes and dtypes there
are is known from the headers alone, so a folder is checked as a whole before anything is written.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
import torch
from safetensors import SafetensorError, safe_open

from checkpoint_convert.fused_experts import Part, parts
from megasft.errors import ConversionError

INDEX: Final = "model.safetensors.index.json"

MAPPED_BYTES: Final = 64 * 2**20
"""A file is opened anew when this much of it has been read."""

DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""What safetensors' headers call them; the library lays out a file in the reverse of this order."""

_SHARD_NAME: Final = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


class _Entry(NamedTuple):
    path: Path
    part: Part
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.part.shape.numel() * self.dtype.itemsize


class HFTensors(Mapping[str, torch.Tensor]):
    """A folder's tensors by name, every routed expert under its own.

    Attributes:
        folder: Where they lie.
        files: The safetensors files they are read from.

    Example:
        >>> HFTensors(Path("Qwen3-0.6B"))["model.norm.weight"].shape
        torch.Size([1024])
    """

    def __init__(self, folder: Path) -> None:
        """Read every header.

        Raises:
            ConversionError: There are no safetensors, a shard is missing or cut off, or two files
                hold the same name.
        """
        self.folder = folder
        self.files = _files(folder)
        self._entries: dict[str, _Entry] = {}
        for path in self.files:
            self._add(path)
        self._open: tuple[Path, Any] | None = None
        self._mapped_bytes = 0

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    view = file.get_slice(name)
                    dtype = DTYPES.get(view.get_dtype())
                    if dtype is None:
                        raise ConversionError(
                            f"{path}: {name} has the dtype {view.get_dtype()}, and "
                            f"{', '.join(DTYPES)} convert"
                        )
                    for part in parts(name, torch.Size(view.get_shape())):
                        self._add_part(path, part, dtype)
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} ({path.stat().st_size:,} bytes) cannot be read: {error}; it is cut off or "
                "not safetensors, fetch it again"
            ) from error

    def _add_part(self, path: Path, part: Part, dtype: torch.dtype) -> None:
        earlier = self._entries.get(part.name)
        if earlier is not None and earlier.path != path:
            raise ConversionError(
                f"{path} repeats {part.name} of {earlier.path.name}; keep one set of weights in "
                f"{self.folder}"
            )
        if earlier is not None:
            raise ConversionError(
                f"{part.name} is there twice, by itself and in one tensor of all experts; keep "
                "one of them"
            )
        self._entries[part.name] = _Entry(path, part, dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of files and headers."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._entries)

    def shape(self, name: str) -> torch.Size:
        """Return a tensor's shape without reading it."""
        return self._entries[name].part.shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        return self._entries[name].dtype

    def meta(self, name: str) -> torch.Tensor:
        """Return a tensor without content, on torch's meta device."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        """Map a tensor; its pages are read when used, and let go with the tensor."""
        entry = self._entries[name]
        file = self._file(entry)
        tensor: torch.Tensor
        if entry.part.place is None:
            tensor = file.get_tensor(entry.part.stored_name)
        else:
            tensor = file.get_slice(entry.part.stored_name)[entry.part.place]
        return tensor

    def _file(self, entry: _Entry) -> Any:
        self._mapped_bytes += entry.num_bytes
        if (
            self._open is None
            or self._open[0] != entry.path
            or self._mapped_bytes > max(MAPPED_BYTES, entry.num_bytes)
        ):
            self.close()
            self._open = (entry.path, safe_open(entry.path, framework="pt"))
            self._mapped_bytes = entry.num_bytes
        return self._open[1]

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget some tensors, as if the folder did not hold them."""
        for name in names:
            del self._entries[name]

    def close(self) -> None:
        """Let go of the file that is open; the next read opens one again."""
        self._open = None


def _files(folder: Path) -> tuple[Path, ...]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConversionError(
            f"{folder} has no *.safetensors; load the model with transformers and write it again "
            "with save_pretrained()"
        )
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(orjson.loads(index.read_bytes())["weight_map"].values())
        except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
            raise ConversionError(
                f"{index} is not an index of shards ({error}); fetch it again"
            ) from error
        _require_shards(folder, sorted(named - {path.name for path in found}), index.name)
        return tuple(path for path in found if path.name in named)
    counts = [(path, m) for path in found if (m := _SHARD_NAME.search(path.name))]
    for path, match in counts:
        stem, total = path.name[: match.start()], match[2]
        wanted = {
            f"{stem}-{i:0{len(total)}}-of-{total}.safetensors" for i in range(1, int(total) + 1)
        }
        _require_shards(folder, sorted(wanted - {path.name for path in found}), path.name)
    return tuple(found)


def _require_shards(folder: Path, missing: list[str], source: str) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConversionError(
            f"{folder} lacks {', '.join(missing[:3])}{more}, which {source} speaks of; fetch the "
            "model again"
        )
