"""``megasft resume-check``: the doctor's section on a checkpoint, with the flags saved in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megasft.cli import doctor
from megasft.cli.findings_output import new_console
from megasft.errors import FlagError


def resume_check(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="--save folder of a run (its newest checkpoint), or an iter_... folder in it",
        ),
    ],
    world_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="ranks of the run to come; default: as many as were"),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="FLAG", help="flag of the checkpoint to leave out; again for more"),
    ] = None,
    rows: Annotated[
        int, typer.Option("--show-rows", min=0, metavar="R", help="rows to print the samples of")
    ] = 3,
) -> None:
    """Show what a run trains next when it is resumed, what changes, and what would be refused.

    `megasft resume-check ckpt/run`

    is `megasft doctor --load ckpt/run` with the flags the checkpoint's run was started with, and
    prints errors and the section on the checkpoint. What will be different is given behind it, as
    it will be given to the run, `--megasft-` flags and Megatron's:

    `megasft resume-check ckpt/run --world-size 16 --context-parallel-size 4 --global-batch-size 32`

    Nothing is trained, no GPU and no model is needed. Exit code **0**: the run will go on where it
    was; **1**: its rows are other rows, or Megatron would refuse it; the difference is named.
    """
    if str(checkpoint).startswith("-"):
        raise FlagError(f"CHECKPOINT comes before the flags of the run, not {checkpoint}")
    with doctor.quiet():
        from megasft.megatron import cpu

        cpu.prepare()
        from megasft.checks.run.subject import Wishes
        from megasft.training import resume

        load, saved = resume.open_checkpoint(checkpoint)
    flags = resume.flags_to_come(saved.megasft_flags, context.args, without=without or ())
    report = doctor.examine(
        [*flags, *load], world_size or int(saved.world_size), Wishes(show_rows=rows)
    )
    shown = [
        finding
        for finding in report.findings
        if not finding.is_ok or finding.theme == "resume" or finding.rule == "complete"
    ]
    if not shown:
        raise FlagError(
            "--finetune and --override-ckpt-iteration set the position by hand, so nothing is "
            "resumed; drop it"
        )
    doctor.print_report(new_console(), replace(report, findings=tuple(shown), facts={}))
    if report.fails():
        raise typer.Exit(1)
