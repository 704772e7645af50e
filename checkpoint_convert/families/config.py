"""A Hugging Face configuration as conversion reads it, and the error about one of its fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasft.errors import ConversionError

Config = Mapping[str, Any]
"""A Hugging Face configuration with every default filled in."""


def not_expressible(path: Path, name: str, value: Any, why: str) -> ConversionError:
    """Return the error about a field whose value Megatron's flags cannot say."""
    return ConversionError(
        f"{path}: {name} is {value!r}, and {why} in this release; converting would change what the "
        "model computes"
    )


def literal(value: Any) -> str:
    """Write a number so that it reads back exactly; ``0.0`` is written ``0``."""
    return str(int(value)) if float(value).is_integer() else repr(value)
