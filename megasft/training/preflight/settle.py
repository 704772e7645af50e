"""The two steps of preflight after which more is known: rows are planned, Megatron accepts flags.

Both do what a run does, on the flags of the run: the rows are those that train, and Megatron's own
validation sees a copy. So whatever Megatron asserts is found before anything starts, in its words
where no rule of ours has better ones.
"""

from __future__ import annotations

import io
import linecache
import traceback
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from megasft.errors import MegasftError
from megasft.training import arguments, datasets, row_order, run_length
from megasft.training.preflight.finding import Hit
from megasft.training.preflight.parallel import sizes_are_positive

if TYPE_CHECKING:
    from megasft.training.preflight.subject import Subject


def refused_flags(subject: Subject) -> Iterator[Hit]:
    """Ask what ``training/arguments.check`` refuses."""
    try:
        arguments.check(subject.args)
    except MegasftError as error:
        yield Hit.from_message(str(error))


def open_rows(subject: Subject) -> Iterator[Hit]:
    """Open the stores and plan their rows, as the run does."""
    args = subject.args
    if not args.megasft_data or not args.seq_length or not sizes_are_positive(args):
        return
    try:
        subject.opened = datasets.open_data(args)
    except MegasftError as error:
        yield Hit.from_message(str(error))


def settle(subject: Subject) -> Iterator[Hit]:
    """Let Megatron validate a copy of the flags, and make the model's configuration of them."""
    from megasft.training.model import model_config

    args, data = deepcopy(subject.args), subject.data
    try:
        row_order.cost_window(args)
        run_length.apply(args, data.train.plan)
        _validate(args)
        datasets.check_length(args, data)
        datasets.set_eval_iters(args, data)
        subject.config = model_config(args)
        subject.validated = args
    except MegasftError as error:
        yield Hit.from_message(str(error))
    except Exception as error:  # Megatron asserts, raises and fails in any way it likes
        yield Hit(
            f"Megatron refuses these flags: {_what_it_says(error)}",
            "change the flags it names; `python -m megasft.pretrain_sft --help` explains each",
        )


def _validate(args: Any) -> None:
    """Run Megatron's validation without what it prints: a thousand lines of flags, and warnings.

    Raises:
        Exception: Whatever Megatron raises; SystemExit becomes an AssertionError.
    """
    from megatron.training.arguments import validate_args

    printed = io.StringIO()
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validate_args(args)
    except SystemExit:
        said = printed.getvalue().strip().splitlines()
        raise AssertionError(said[-1] if said else "it exits") from None


def _what_it_says(error: Exception) -> str:
    """Return the message of an error, or the assertion itself where it has none."""
    if str(error).strip():
        return " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{type(error).__name__} at `{line}`"
