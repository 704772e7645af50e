"""Which checkpoints stay on disk: ``--megasft-keep-last N``, whatever is the best, and KEEP files.

A checkpoint of a large model is terabytes with its optimizer, and Megatron's ``--save-retain-
interval`` deletes the one before as soon as the next is whole. Here the newest ``N`` whole ones
stay, each whose folder holds a file named ``KEEP`` (``touch iter_0000400/KEEP``: while one is being
exported, say), and each somebody else names. Only what Megatron's tracker calls whole is counted or
deleted; a folder newer than that is being written.

One rank looks whenever a step ends, which is one ``stat``; folders are renamed first and removed in
a thread, so no step waits for a file system and no half-deleted folder bears a checkpoint's name.
"""

import argparse
import logging
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

from megasft.errors import FlagError

logger = logging.getLogger(__name__)

TRACKER: Final = "latest_checkpointed_iteration.txt"
KEEP: Final = "KEEP"
_DOOMED: Final = ".deleted."
_PREFIX: Final = "iter_"


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of retention."""
    group.add_argument(
        "--megasft-keep-last",
        type=int,
        metavar="N",
        help="delete older checkpoints in --save, but for the N newest and those whose folder "
        f"holds a file named {KEEP} (default: keep all)",
    )


def check(keep_last: int | None, save: str | None, *, retain_interval: int | None) -> None:
    """Refuse a number that keeps nothing, or has no effect.

    Raises:
        FlagError: With the fact and the remedy.
    """
    if keep_last is None:
        return
    if keep_last < 1:
        raise FlagError(f"--megasft-keep-last is {keep_last}; a run resumes from 1 at least")
    if save is None:
        raise FlagError("--megasft-keep-last has no effect without --save DIR; add or drop one")
    if retain_interval is not None:
        raise FlagError("--megasft-keep-last and --save-retain-interval exclude each other")


class Retention:
    """Deletes checkpoints that are not to be kept; for one rank of a run.

    Args:
        folder: Megatron's ``--save``.
        keep_last: Newest whole checkpoints that stay.
        foreign: Iterations that another run saved there; they stay, too.
    """

    def __init__(self, folder: Path, *, keep_last: int, foreign: Collection[int] = ()) -> None:
        self.folder, self.keep_last, self.foreign = folder, keep_last, foreign
        self._seen = 0
        self._deleting: list[threading.Thread] = []

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint was saved since the last look; one ``stat``, for every step."""
        return self._changed() not in (0, self._seen)

    def _changed(self) -> int:
        """Return when the tracker was written, in ns; 0 when nothing was saved yet."""
        try:
            return (self.folder / TRACKER).stat().st_mtime_ns
        except OSError:
            return 0

    def look(self, keep: Collection[int] = ()) -> None:
        """Delete what a new whole checkpoint has made superfluous.

        Args:
            keep: Iterations to be kept besides.
        """
        changed = self._changed()
        if changed in (0, self._seen):
            return
        if not self._seen:  # what an earlier process did not get done
            for doomed in self.folder.glob(f"{_DOOMED}*"):
                self._remove(doomed)
        self._seen = changed
        for iteration in superfluous(
            self.folder, keep_last=self.keep_last, keep={*keep, *self.foreign}
        ):
            self._delete(checkpoint_folder(self.folder, iteration))

    def wait(self) -> None:
        """Return when everything is deleted."""
        for thread in self._deleting:
            thread.join()

    def _delete(self, checkpoint: Path) -> None:
        doomed = checkpoint.with_name(f"{_DOOMED}{checkpoint.name}.{time.time_ns()}")
        try:
            checkpoint.rename(doomed)
        except OSError as error:
            logger.warning("%s cannot be deleted (%s); it stays", checkpoint, error)
            return
        logger.info("deleted %s: --megasft-keep-last %d", checkpoint, self.keep_last)
        self._remove(doomed)

    def _remove(self, doomed: Path) -> None:
        thread = threading.Thread(target=shutil.rmtree, args=(doomed, True), daemon=True)
        thread.start()
        self._deleting.append(thread)


def checkpoint_folder(folder: Path, iteration: int) -> Path:
    """Return where Megatron saves a step."""
    return folder / iteration_name(iteration)


def iteration_name(iteration: int) -> str:
    """Return the name of the folder Megatron saves a step in."""
    return f"{_PREFIX}{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def whole_checkpoints(folder: Path) -> list[int]:
    """Return the iterations saved whole, ascending."""
    try:
        newest = int((folder / TRACKER).read_text())
    except (OSError, ValueError):
        return []  # nothing saved, or a converted checkpoint ("release")
    folders = (path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
    numbers = (path.name.removeprefix(_PREFIX) for path in folders)
    found = sorted(int(number) for number in numbers if number.isdecimal())
    return [iteration for iteration in found if iteration <= newest]


def superfluous(folder: Path, *, keep_last: int, keep: Collection[int] = ()) -> list[int]:
    """Return the iterations that are neither new nor to be kept for another reason."""
    return [
        iteration
        for iteration in whole_checkpoints(folder)[:-keep_last]
        if iteration not in keep and not (checkpoint_folder(folder, iteration) / KEEP).exists()
    ]
