"""What rules look at: the flags, the machine, then the rows, then what Megatron makes of the flags.

It fills up as the run starts (``run/start.py``), and a rule says which of it it needs
(``rules.py``). Flags come in two states: as parsed, with what the user left out missing, and
``settled``, a copy that went through Megatron's own validation, with every default derived. Rules
on wrong flags read the first, because the second does not exist when a flag is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megasft.checks.run.machine import Machine
from megasft.packing.cost_window import CostWindow
from megasft.training.datasets import RunData


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the doctor is told that neither flags nor the machine say.

    Attributes:
        gpu_memory_gb: Memory of a GPU that is not here, in GB (1e9 bytes).
        tokens_per_second: True tokens of one GPU, padding not counted; measured or hoped for.
    """

    gpu_memory_gb: float | None = None
    tokens_per_second: float | None = None


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
        validated: A copy of the flags after Megatron's validation, once it accepts them.
        config: Megatron's configuration of the model, once it accepts that.
    """

    machine: Machine
    wishes: Wishes
    flags: Any = None
    opened: RunData | None = None
    window: CostWindow | None = None
    is_over: bool = False
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
