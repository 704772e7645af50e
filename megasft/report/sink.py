"""What a place to write records to must do, and what it knows about the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megasft.report.record import Record


class ScalarWriter(Protocol):
    """What is asked of TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Queue a value."""
        ...

    def flush(self) -> None:
        """Write what is queued."""
        ...


@dataclass(frozen=True, slots=True)
class Setup:
    """What sinks need to know.

    Attributes:
        folder: Log folder; None when the run keeps none.
        flags: The run's flags, for trackers that show them.
        writer: TensorBoard's, where Megatron made one.
        wandb: Megatron's writer to W&B, where it made one (``--wandb-project``).
        valid_names: Validation sets whose losses are also written by Megatron's own tags.
        console_interval: Steps from one printed line to the next; 0 prints none.
        table_interval: Steps from one printed table of categories to the next; 0 prints none.
        trains: Whether the run trains, and not only evaluates.
    """

    folder: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    writer: ScalarWriter | None = None
    wandb: Any = None
    valid_names: Sequence[str] = ()
    console_interval: int = 1
    table_interval: int = 0
    trains: bool = True


class Sink(Protocol):
    """Where records go. What it was given is on its way when a method returns."""

    def write(self, record: Record) -> None:
        """Write a training step or an evaluation."""
        ...

    def close(self) -> None:
        """End the run; nothing is written after it."""
        ...
