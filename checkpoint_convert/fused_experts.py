"""Experts that a folder holds as one tensor, taken apart into one tensor per expert.

Published folders, and what transformers saves, name every expert's tensors. In memory transformers
5 has all experts of a layer in one tensor, and folders written from that memory hold it as it is.
The way back writes the names per expert, which every reader of these families takes.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch

from megasft.errors import ConversionError

GATE_AND_UP: Final = "gate_up_proj"
DOWN: Final = "down_proj"


class Part(NamedTuple):
    """A tensor under the name that rules use, and where it lies.

    Attributes:
        stored_name: The tensor it is a part of, or itself.
        place: Its index in that tensor; None for the whole of it.
    """

    name: str
    stored_name: str
    place: tuple[int, slice] | int | None
    shape: torch.Size


def parts(name: str, shape: torch.Size) -> list[Part]:
    """Return the tensors that a stored one holds: of fused experts each, else itself.

    Args:
        name: ``...experts.gate_up_proj`` is [experts, 2 * size, hidden], gate before up, and
            ``...experts.down_proj`` is [experts, hidden, size].
        shape: Of the stored tensor.
    """
    owner, _, part = name.rpartition(".")
    if not owner.endswith(".experts") or part not in (GATE_AND_UP, DOWN):
        return [Part(name, name, None, shape)]
    found = []
    for i in range(shape[0]):
        one = f"{owner}.{i}"
        if part == DOWN:
            found.append(Part(f"{one}.down_proj.weight", name, i, shape[1:]))
            continue
        size = shape[1] // 2
        half = torch.Size((size, *shape[2:]))
        found.append(Part(f"{one}.gate_proj.weight", name, (i, slice(0, size)), half))
        found.append(Part(f"{one}.up_proj.weight", name, (i, slice(size, 2 * size)), half))
    return found


def taken_apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in memory with every expert under its own name; views, not copies.

    Raises:
        ConversionError: One is there in both forms.
    """
    result: dict[str, torch.Tensor] = {}
    for stored_name, tensor in tensors.items():
        for part in parts(stored_name, tensor.shape):
            if part.name in result:
                raise ConversionError(
                    f"{part.name} is there twice, by itself and in one tensor of all experts; keep "
                    "one of them"
                )
            result[part.name] = tensor if part.place is None else tensor[part.place]
    return result
