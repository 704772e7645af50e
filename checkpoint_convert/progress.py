"""A progress bar in bytes on standard error, of this process's share of the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from checkpoint_convert.team import Team


@contextmanager
def progress_bar(label: str, num_bytes: int, team: Team) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many bytes are done; only the first process draws.

    Args:
        label: What is being done.
        num_bytes: Of all this process will do.
        team: Whose share it is.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
    )
    is_shown = team.leads and console.is_terminal
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        task = progress.add_task(label, total=num_bytes)
        yield lambda done: progress.advance(task, done)
