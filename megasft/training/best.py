"""The best checkpoint by a validation loss, and ending a run that gets no better.

``best.json`` in the folder of ``--save`` names the iteration, set and loss of the best evaluation
so far, and lists all of them. With ``--megasft-best`` a checkpoint is saved at every evaluation
that is the best so far, whatever ``--save-interval``, and retention keeps it; with
``--megasft-early-stop N`` the run ends after the Nth evaluation in a row that was not.

The list is there for runs that go back: a run killed after an evaluation resumes from an earlier
checkpoint, and must then know the best one *until there*, which is a checkpoint it may not delete.

Megatron evaluates before it decides to save and to exit, by ``iteration % interval``; so an
interval of exactly this iteration makes it do either now. All ranks get the same losses and decide
alike. Rejected: to save from here, beside Megatron's own saving.
"""

import argparse
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
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
        help="end the run after N evaluations in a row without a new best (with --megasft-best)",
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


def loss_of_each(sets: Mapping[str, Losses | None]) -> dict[str, float]:
    """Return what is optimised, of each validation store and as the mean over all their units.

    Args:
        sets: Losses by name; None for a store without labels.
    """
    known = {name: losses for name, losses in sets.items() if losses is not None}
    total = sum(losses.loss * losses.divisor for losses in known.values())
    mean = total / sum(losses.divisor for losses in known.values()) if known else math.nan
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


class Evaluation(NamedTuple):
    """The loss of the followed validation set after a step."""

    iteration: int
    loss: float


def best_of(evaluations: Sequence[Evaluation]) -> Best:
    """Return the lowest loss, the earliest of equals; a loss that is not a number is never it.

    Example:
        >>> best_of([Evaluation(2, 7.0), Evaluation(4, 6.5), Evaluation(6, 6.5)])
        Best(iteration=4, loss=6.5, since=1)
    """
    best = Best()
    for iteration, loss in evaluations:
        is_better = loss < best.loss
        best = Best(iteration, loss) if is_better else best._replace(since=best.since + 1)
    return best


def read_evaluations(folder: Path, *, name: str, until: int) -> list[Evaluation]:
    """Return the evaluations that ``best.json`` holds, up to where a run goes on.

    Args:
        folder: Megatron's ``--save``.
        name: The validation store the run goes by; those of another one do not count.
        until: Steps trained in the checkpoint that the run starts from. Later evaluations are made
            again, by weights that will be trained again.
    """
    try:
        saved = orjson.loads((folder / FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return []
    # What an older version wrote names the best evaluation, and counts those after it.
    of_best = [saved["iteration"], saved["loss"]]
    not_better = [[saved["iteration"], None]] * saved["evaluations_since"]
    made = saved.get("evaluations", [of_best, *not_better])
    # JSON has no nan; it is written as null.
    found = [Evaluation(step, math.nan if loss is None else loss) for step, loss in made]
    return [e for e in found if e.iteration <= until] if saved["set"] == name else []


def has_lost_patience(args: Any, *, iteration: int) -> bool:
    """Say whether ``--megasft-early-stop`` has ended a run after this step.

    Args:
        args: Megatron's flags and ours.
        iteration: Of the last checkpoint.
    """
    if args.megasft_early_stop is None:
        return False
    made = read_evaluations(Path(args.save), name=args.megasft_best, until=iteration)
    ends_there = bool(made) and made[-1].iteration == iteration
    return ends_there and best_of(made).since >= args.megasft_early_stop


class BestTracker:
    """Follows the evaluations of a run; every rank has one.

    Args:
        args: Megatron's flags, whose intervals it sets.
        writes: Whether this rank writes ``best.json``.

    Attributes:
        has_ended_run: Whether the run ends, because it gets no better.
        intervals: Where Megatron reads ``save_interval``: in its flags during a run.
    """

    def __init__(self, args: Any, *, writes: bool) -> None:
        self.args, self.writes = args, writes
        self.name = str(args.megasft_best)
        self.folder = Path(args.save)
        self.has_ended_run = False
        self.intervals = [args]
        self._interval = args.save_interval

    @cached_property
    def _made(self) -> list[Evaluation]:
        """What earlier parts of the run found; Megatron has loaded a checkpoint by then."""
        return read_evaluations(self.folder, name=self.name, until=int(self.args.iteration))

    @property
    def kept(self) -> set[int]:
        """Iterations that retention must leave."""
        return {best_of(self._made).iteration} if self._made else set()

    def kept_until(self, iteration: int) -> set[int]:
        """Return the best of the evaluations up to a step, as a set."""
        made = [each for each in self._made if each.iteration <= iteration]
        return {best_of(made).iteration} if made else set()

    def begin_step(self) -> None:
        """Take back what made Megatron save after the last step."""
        self._set_interval(self._interval)

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Follow an evaluation, before Megatron decides whether to save and to end.

        Args:
            iteration: Steps trained before it. That of a step which was evaluated already changes
                nothing: the command of a finished run, given again, makes one.
            losses: Of each validation store, and of all together.
        """
        if self._made and iteration <= self._made[-1].iteration:
            return
        loss = losses[self.name]
        self._made.append(Evaluation(iteration, loss))
        best = best_of(self._made)
        if best.iteration == iteration:
            self._set_interval(iteration)
            logger.info("validation %s: %.6g is the lowest so far", self.name, loss)
        if self.writes:
            self._write(best)
        patience = self.args.megasft_early_stop
        if patience is not None and best.since >= patience:
            logger.info(
                "the run ends: %d evaluations since step %d (%.6g) were no better",
                *(best.since, best.iteration, best.loss),
            )
            self.args.exit_interval, self.has_ended_run = iteration, True

    def _set_interval(self, steps: int | None) -> None:
        for settings in self.intervals:
            settings.save_interval = steps

    def _write(self, best: Best) -> None:
        fields = {
            "iteration": best.iteration,
            "set": self.name,
            "loss": best.loss,
            "evaluations_since": best.since,
            "evaluations": [list(each) for each in self._made],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / FILE, orjson.dumps(fields, option=orjson.OPT_INDENT_2))
