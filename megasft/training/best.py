"""The best checkpoint by a validation loss, and ending a run that gets no better.

``best.json`` in the folder of ``--save`` names the iteration, set and loss of the best evaluation
so far. With ``--megasft-best`` a checkpoint is saved at every evaluation that is the best so far,
whatever ``--save-interval``, and retention keeps it; with ``--megasft-early-stop N`` the run ends
behind the Nth evaluation in a row that was not.

Megatron evaluates before it decides to save and to exit, by ``iteration % interval``; so an
interval of exactly this iteration is how it is told to do either now. All ranks hear the same
losses and decide alike. Rejected: to save from here, beside Megatron's own saving.
"""

import argparse
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from megasft.errors import FlagError
from megasft.files import write_whole
from megasft.report.record import Losses

logger = logging.getLogger(__name__)

FILE: Final = "best.json"
ALL: Final = "all"
"""What the mean over all validation stores is called."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the best checkpoint."""
    group.add_argument(
        "--megasft-best",
        nargs="?",
        const=ALL,
        metavar="NAME",
        help="save a checkpoint at each evaluation whose loss is the lowest so far, and keep it; "
        "by the validation store of that name, or by all of them together; DIR/best.json in "
        "--save says which it is",
    )
    group.add_argument(
        "--megasft-early-stop",
        type=int,
        metavar="N",
        help="end the run behind N evaluations in a row without a new best (with --megasft-best)",
    )


def check(args: Any, names: Collection[str]) -> None:
    """Refuse what has no effect.

    Args:
        args: Megatron's flags and ours.
        names: Of the validation stores.

    Raises:
        FlagError: With the fact and the remedy.
    """
    if args.megasft_early_stop is not None and args.megasft_early_stop < 1:
        raise FlagError(f"--megasft-early-stop is {args.megasft_early_stop}; the least is 1")
    if args.megasft_best is None:
        if args.megasft_early_stop is not None:
            raise FlagError("--megasft-early-stop has no effect without --megasft-best; add it")
        return
    if not args.save:
        raise FlagError("--megasft-best has no effect without --save DIR; add or drop one")
    if not names:
        raise FlagError("--megasft-best goes by a validation loss; add --megasft-valid-data STORE")
    if args.megasft_best not in {ALL, *names}:
        raise FlagError(
            f"--megasft-best {args.megasft_best} is no validation store; there are "
            f"{', '.join(names)} (and {ALL}: all together)"
        )


def loss_of_each(sets: Mapping[str, Losses | None], *, objective: str) -> dict[str, float]:
    """Return what is optimised, of each validation store and as the mean over all their units.

    Args:
        sets: Losses by name; None for a store without labels.
        objective: A name of ``OBJECTIVES``.
    """
    known = {name: losses for name, losses in sets.items() if losses is not None}
    units = {
        name: {"turn": one.turns, "sample": one.samples, "token": one.labels}[objective]
        for name, one in known.items()
    }
    total = sum(known[name].loss * units[name] for name in known)
    mean = total / sum(units.values()) if known else math.nan
    return dict.fromkeys(sets, math.nan) | {n: one.loss for n, one in known.items()} | {ALL: mean}


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
        iteration: When it was made.
        loss: Of the validation set.
        since: Evaluations since then that were not better.
    """

    iteration: int = 0
    loss: float = math.inf
    since: int = 0


class BestTracker:
    """Follows the evaluations of a run; every rank has one.

    Args:
        args: Megatron's flags, whose intervals it sets.
        writes: Whether this rank writes ``best.json``.
    """

    def __init__(self, args: Any, *, writes: bool) -> None:
        self.args, self.writes = args, writes
        self.name = str(args.megasft_best)
        self.path = Path(args.save) / FILE
        self.has_ended_run = False
        self._interval = args.save_interval
        self._best: Best | None = None

    @property
    def kept(self) -> set[int]:
        """Iterations that retention must leave."""
        return set() if self._best is None else {self._best.iteration}

    def begin_step(self) -> None:
        """Take back what made Megatron save behind the last step."""
        self.args.save_interval = self._interval

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Hear of an evaluation, before Megatron decides whether to save and to end.

        Args:
            iteration: Step it was made behind.
            losses: Of each validation store, and of all together.
        """
        best, loss = self._best or self._read(before=iteration), losses[self.name]
        if loss < best.loss:
            best = Best(iteration, loss)
            self.args.save_interval = iteration
            logger.info("validation %s: %.6g is the lowest so far", self.name, loss)
        else:
            best = best._replace(since=best.since + 1)
        self._best = best
        if self.writes:
            self._write(best)
        patience = self.args.megasft_early_stop
        if patience is not None and best.since >= patience:
            logger.info(
                "the run ends: %d evaluations since step %d (%.6g) were no better",
                *(best.since, best.iteration, best.loss),
            )
            self.args.exit_interval, self.has_ended_run = iteration, True

    def _read(self, *, before: int) -> Best:
        """Return what an earlier part of the run found, unless this one goes back behind it."""
        try:
            saved = orjson.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return Best()
        found = Best(saved["iteration"], saved["loss"], saved["evaluations_since"])
        return found if saved["set"] == self.name and found.iteration < before else Best()

    def _write(self, best: Best) -> None:
        fields = {
            "iteration": best.iteration,
            "set": self.name,
            "loss": best.loss,
            "evaluations_since": best.since,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, orjson.dumps(fields, option=orjson.OPT_INDENT_2))
