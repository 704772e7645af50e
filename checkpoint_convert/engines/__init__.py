"""Families that this package has no rules for, through somebody else's bridge if it is installed.

A bridge knows hundreds of models and is a heavy guest: importing mcore-bridge patches Megatron for
the life of the process, and both bridges want Transformer Engine and the whole model in memory. So
it works in a process of its own (``engines.worker``), and what comes out has the form of our own
conversion: the same folder, keys and flags file, and logits that are verified against transformers
by the model that training will build. That last is what makes it safe: a bridge may build a model
that Megatron's flags cannot say, and such a checkpoint fails here and not in training.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from megasft.errors import ConversionError


class Engine(NamedTuple):
    """A bridge.

    Attributes:
        module: What it is imported as.
        package: What it is installed as.
    """

    module: str
    package: str


ENGINES: Final = {
    "mcore-bridge": Engine("mcore_bridge", "mcore-bridge"),
    "megatron-bridge": Engine("megatron.bridge", "megatron-bridge"),
}
"""By the name that ``--engine`` takes."""

WORKER: Final = "checkpoint_convert.engines.worker"
SHOWN_LINES: Final = 15


def require(name: str) -> Engine:
    """Return an engine, without importing it.

    Raises:
        ConversionError: It is unknown, or not installed.
    """
    if name not in ENGINES:
        raise ConversionError(f"--engine is {name!r}; there are: own, {', '.join(ENGINES)}")
    engine = ENGINES[name]
    missing = [
        package
        for module, package in (
            (engine.module, engine.package),
            ("transformer_engine", "transformer-engine[pytorch]"),
        )
        if not _is_there(module)
    ]
    if missing:
        raise ConversionError(
            f"--engine {name} needs {' and '.join(missing)}, not installed here; pip install "
            f"{' '.join(missing)}, or take a family that --engine own converts"
        )
    return engine


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def run(name: str, direction: str, arguments: Sequence[str | Path]) -> None:
    """Run a bridge in a process of its own.

    Args:
        name: Of the engine.
        direction: ``to-megatron`` or ``to-hf``.
        arguments: See ``engines.worker``.

    Raises:
        ConversionError: It failed; with the end of what it printed.
    """
    require(name)
    result = subprocess.run(
        [sys.executable, "-m", WORKER, name, direction, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        end = "\n".join(result.stdout.strip().splitlines()[-SHOWN_LINES:])
        raise ConversionError(f"--engine {name} failed with exit code {result.returncode}:\n{end}")
