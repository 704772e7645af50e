"""What rules look at: the flags, the machine, then the rows, then what Megatron makes of the flags.

It fills up as the run starts (``run/start.py``), and a rule says which stage it needs. Flags come
in two states: as parsed, with what the user left out missing, and ``settled``, a copy that went
through Megatron's own validation, with every default derived. Rules on wrong flags read the first,
because the second does not exist when a flag is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from megasft.megatron.checkpoint import NextStep
from megasft.packing.cost_window import CostWindow
from megasft.training.datasets import RunData


class Stage(StrEnum):
    """What is known when a rule runs; stages follow each other in this order.

    ``OPEN``, ``LENGTH`` and ``SETTLE`` hold steps, which make the next stage possible.
    """

    MACHINE = "machine"
    FLAGS = "flags"
    OPEN = "open"
    DATA = "data"
    LENGTH = "length"
    SETTLE = "settle"
    MODEL = "model"


class Gpu(NamedTuple):
    """A CUDA device.

    Attributes:
        name: As its driver gives it.
        memory: All of it, in bytes.
        capability: Compute capability, major and minor.
    """

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process sees of its machine.

    Attributes:
        versions: Package to version; None where it is not installed. Python, CUDA and NCCL too.
        gpus: Empty without CUDA.
        num_cpus: Cores this process may use.
        shm: Bytes of shared memory (``/dev/shm``).
        open_files: How many files a process may have open; -1 without a limit.
        locked_memory: Bytes a process may lock; -1 without a limit.
        has_infiniband: Whether there is such a device.
        environment: Environment variables.
    """

    versions: Mapping[str, str | None]
    gpus: tuple[Gpu, ...]
    num_cpus: int
    shm: int
    open_files: int
    locked_memory: int
    has_infiniband: bool
    environment: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the facts, without the environment."""
        return {
            "versions": dict(self.versions),
            "gpus": [gpu._asdict() for gpu in self.gpus],
            "cpus": self.num_cpus,
            "shared_memory": self.shm,
            "open_files": self.open_files,
            "locked_memory": self.locked_memory,
        }


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the doctor is told that neither flags nor the machine say.

    Attributes:
        gpu_memory_gb: Memory of a GPU that is not here, in GB (1e9 bytes).
        tokens_per_second: True tokens of one GPU, padding not counted; measured or hoped for.
        show_rows: Rows of the step after a checkpoint whose samples are shown.
    """

    gpu_memory_gb: float | None = None
    tokens_per_second: float | None = None
    show_rows: int = 3


@dataclass(slots=True)
class Subject:
    """One run, before it starts.

    Attributes:
        machine: Where it will run.
        wishes: What the doctor was told besides.
        flags: Megatron's flags and ours, as parsed; None when the machine alone is looked at.
        opened: Stores and rows, once they could be opened.
        window: How far rows may move to even out global batches, once there are rows.
        is_over: It has ended already: there is nothing to check, and nothing to do.
        saved: What Megatron keeps beside the tensors of the checkpoint it goes on from, if any.
        schedule: What was set for its learning-rate schedule then, in a sentence.
        next_step: The step after that checkpoint, once Megatron accepts it.
        validated: A copy of the flags after Megatron's validation, once it accepts them.
        config: Megatron's configuration of the model, once it accepts that.
    """

    machine: Machine
    wishes: Wishes
    flags: Any = None
    opened: RunData | None = None
    window: CostWindow | None = None
    is_over: bool = False
    saved: dict[str, Any] | None = None
    schedule: str | None = None
    next_step: NextStep | None = None
    validated: Any = None
    config: Any = None

    @property
    def args(self) -> Any:
        """Flags as parsed, for rules that run only when there are some."""
        assert self.flags is not None
        return self.flags

    @property
    def data(self) -> RunData:
        """Stores and rows, for rules that run only when they are open."""
        assert self.opened is not None
        return self.opened

    @property
    def settled(self) -> Any:
        """Validated flags, for rules that run only when Megatron accepts them."""
        assert self.validated is not None
        return self.validated
