"""The start of a run, the only one: what is checked, opened and settled before Megatron begins.

Training, ``megasft doctor``, ``megasft resume-check`` and proofs go through it, so what one refuses
the others refuse, in the same words and order. It is a row of steps. A step changes flags, opens
data or asks Megatron; preflight's rules are asked between them, as soon as what they look at is
there. A step returns what it warns of, and its refusal is an error of the rule of its name; what
needs it is left unchecked, which is said.

Steps change a copy of the flags: rules on flags as a user gave them read the first, the run goes on
with the second.
"""

from __future__ import annotations

import io
import linecache
import logging
import sys
import traceback
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from megasft.checks.engine import Report, Severity
from megasft.checks.run import machine
from megasft.checks.run.flags import sizes_are_positive
from megasft.checks.run.run import Examination
from megasft.checks.run.subject import Stage, Subject, Wishes
from megasft.errors import FlagError, MegasftError
from megasft.megatron import checkpoint, flags
from megasft.training import arguments, datasets, resume, row_order, run_length, saving

logger = logging.getLogger("megasft")


def begin(args: Any) -> Subject:
    """Start a run: return everything it needs, and say what it warns of.

    Args:
        args: Megatron's flags and ours, as parsed.

    Raises:
        FlagError: Something is wrong; all of it, with the remedies.
    """
    run = Subject(machine.look(), Wishes(), args)
    report = examine(run, in_run=True)
    for finding in report.of(Severity.WARNING):
        logger.warning("%s", finding.message)
    for item in report.unchecked if run.validated is not None else ():
        logger.warning("not checked: %s, since %s", ", ".join(item.rules), item.why)
    require(report)
    return run


def require(report: Report) -> None:
    """Let a run go on unless something is wrong with it.

    Raises:
        FlagError: All that is, with the remedies.
    """
    errors = [error.message for error in report.of(Severity.ERROR)]
    if errors:
        raise FlagError(_listed(errors))


def examine(run: Subject, *, in_run: bool = False) -> Report:
    """Take all steps and ask all rules, as far as they can be reached.

    Args:
        run: Its flags and machine; the rest of it is filled in.
        in_run: Leave out notes, and let steps print what they have to say.
    """
    asked = Examination(run, in_run)
    asked.ask(Stage.MACHINE)
    if run.flags is None or _is_over(asked, run.args):
        return asked.report()
    asked.ask(Stage.FLAGS)
    asked.take("refused-flag", lambda: arguments.check(run.args))
    if asked.has("store"):
        asked.skip(Stage.OPEN, "a store cannot be read")
    else:
        asked.take("rows", lambda: _open(run))
    if run.opened is None:
        for stage in (Stage.DATA, Stage.LENGTH, Stage.SETTLE, Stage.MODEL):
            asked.skip(stage, "there are no rows, see the errors")
        return asked.report()
    asked.ask(Stage.DATA)
    args = deepcopy(run.args)
    if not asked.take("length", lambda: _set_length(run, args)):
        for stage in (Stage.SETTLE, Stage.MODEL):
            asked.skip(stage, "the run has no length, see the errors")
        return asked.report()
    if _is_over(asked, args):
        return asked.report()
    has_errors = asked.has_errors
    resumes = asked.take("resume", lambda: _follow_checkpoint(run, args))
    # Megatron says again, in its own words, what was found already.
    asked.take("megatron-refuses", lambda: _accept(run, args, prints=in_run), is_said=has_errors)
    if run.validated is None:
        asked.skip(Stage.MODEL, "Megatron does not accept the flags, see the errors")
    else:
        if resumes:
            asked.take("resume-refused", lambda: _ask_for_next_step(run))
        asked.ask(Stage.MODEL)
    return asked.report()


def accept(args: Any, data: datasets.RunData | None = None, *, prints: bool = False) -> Any:
    """Let Megatron validate flags, and return its configuration of the model.

    Args:
        args: Megatron's flags and ours; every default is derived.
        data: What is trained and validated on, for a run that trains.
        prints: Print what Megatron does: all flags, one a line.

    Raises:
        FlagError: Megatron refuses the flags, in its words.
    """
    from megasft.megatron.model import model_config

    printed = io.StringIO()
    try:
        flags.validate(args, printed)
        if data is not None:
            datasets.check_length(args, data)
            datasets.set_eval_iters(args, data)
        config = model_config(args)
    except MegasftError:
        raise
    except (Exception, SystemExit) as error:  # Megatron asserts, raises and exits as it likes
        said = printed.getvalue().strip().splitlines() if isinstance(error, SystemExit) else []
        raise FlagError(
            f"Megatron refuses these flags: {said[-1] if said else _words_of(error)}; change the "
            "flags it names (`python -m megasft.pretrain_sft --help` explains each)"
        ) from error
    if prints:
        sys.stdout.write(printed.getvalue())
    return config


def _is_over(asked: Examination, args: Any) -> bool:
    """Say whether a run has ended already; then nothing about it need be checked."""
    is_over = asked.subject.is_over = saving.is_over(args)
    if is_over:
        asked.say("complete", f"the run is complete: {args.save} holds its last checkpoint")
    return is_over


def _open(run: Subject) -> list[str]:
    """Open the stores and plan their rows, unless a rule has said already why that fails."""
    args = run.args
    if not (args.megasft_data and args.seq_length and sizes_are_positive(args)):
        return []
    run.opened = data = datasets.open_data(args)
    return [
        warning
        for planned in (data.train, *data.valid.values())
        for warning in (*planned.store.meta.get("warnings", ()), *planned.plan.warnings)
    ]


def _set_length(run: Subject, args: Any) -> None:
    run.window = row_order.cost_window(args)
    run_length.apply(args, run.data.train.plan)
    saving.apply(args)


def _follow_checkpoint(run: Subject, args: Any) -> list[str]:
    run.saved = resume.state_to_resume(args)
    identity = row_order.identity(run.data.train.plan, run.window)
    warnings = resume.check(args, run.saved, identity)
    saving.check_steps_left(args)
    run.schedule = resume.follow_schedule(args, run.saved)
    if run.schedule is not None:
        logger.info("%s", run.schedule)
    return warnings


def _ask_for_next_step(run: Subject) -> None:
    args = run.settled
    # Without training there is no such step, and with the other flag its place is set by hand.
    if run.saved is not None and not args.skip_train and args.override_ckpt_iteration is None:
        run.next_step = checkpoint.next_step(args, run.saved)


def _accept(run: Subject, args: Any, *, prints: bool) -> None:
    run.config = accept(args, run.data, prints=prints)
    run.validated = args


def _words_of(error: BaseException) -> str:
    """Return the message of an error, or the assertion itself where it has none."""
    if str(error).strip():
        return " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{type(error).__name__} at `{line}`"


def _listed(errors: Sequence[str]) -> str:
    if len(errors) == 1:
        return errors[0]
    lines = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
    return f"{len(errors)} things are wrong with this run:\n{lines}"
