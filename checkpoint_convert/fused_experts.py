"""Experts that a folder holds as one tensor, taken apart into one tensor per expert.

Published folders, and what transformers saves, name every expert's tensors. In memory transformers
5 has all experts of a layer in one tensor, and folders written from that memory hold it as it is.
The way back writes the names per expert, which every reader of these families takes.
"""

from collections.abc import Mapping
from typing import Final

import torch

from megasft.errors import ConversionError

GATE_AND_UP: Final = "gate_up_proj"
DOWN: Final = "down_proj"


def taken_apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with every expert under its own name; views, not copies.

    Args:
        tensors: By Hugging Face name; ``...experts.gate_up_proj`` is [experts, 2 * size, hidden],
            gate before up, and ``...experts.down_proj`` is [experts, hidden, size].

    Raises:
        ConversionError: A folder holds one tensor in both forms.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for part_name, part in _parts(name, tensor):
            if part_name in result:
                raise ConversionError(
                    f"{part_name} is there twice, by itself and in one tensor of all experts; keep "
                    "one of them"
                )
            result[part_name] = part
    return result


def _parts(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    owner, _, part = name.rpartition(".")
    if not owner.endswith(".experts") or part not in (GATE_AND_UP, DOWN):
        return [(name, tensor)]
    found = []
    for i, one in enumerate(tensor):
        if part == DOWN:
            found.append((f"{owner}.{i}.down_proj.weight", one))
            continue
        gate, up = one.chunk(2)
        found.append((f"{owner}.{i}.gate_proj.weight", gate))
        found.append((f"{owner}.{i}.up_proj.weight", up))
    return found
