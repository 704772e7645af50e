"""The ways samples become rows, by the name of the flag."""

from typing import Final

from megasft.packing.balanced import balanced
from megasft.packing.best_fit import best_fit
from megasft.packing.in_order import one_each, sequential
from megasft.packing.rows import Packer

PACKERS: Final[dict[str, Packer]] = {
    "balanced": balanced,
    "best_fit": best_fit,
    "sequential": sequential,
    "none": one_each,
}

DEFAULT_PACKER: Final = "balanced"

KEEP_ORDER: Final = frozenset({"sequential", "none"})
"""Packers that make the same rows whatever the seed."""
