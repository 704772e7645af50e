"""The processes of one conversion: alone, or what ``torchrun --nproc-per-node N`` started.

Units of work are known to all from the headers, so the processes need to agree on nothing but when
a stage is over. They may sit on several nodes that share a file system.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE: Final = timedelta(days=7)
"""How long to wait for the others: a conversion of a terabyte takes its time, and when a process
dies torchrun ends the rest."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among all."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that makes folders and prints."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Return this process's part of some work, every ``size``-th item.

        Example:
            >>> Team(rank=1, size=2).share("abcde")
            ['b', 'd']
        """
        return list(work[self.rank :: self.size])

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()


ALONE: Final = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """Join the processes torchrun started; without torchrun there is only this one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Team(rank=torch.distributed.get_rank(), size=size)
    finally:
        torch.distributed.destroy_process_group()
