"""``megasft doctor``: what is wrong with this machine, or with a run, before it starts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from megasft.cli.findings_output import (
    STYLES,
    as_json,
    new_console,
    print_hanging,
    print_rules,
    print_verdict,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.checks.engine import Finding, Report
    from megasft.checks.run.subject import Wishes


PASS_ON: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer settings of this command: what is not its own is a flag of the run."""


def doctor(
    context: typer.Context,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="ranks of the run; default: those of the RUN.YAML, WORLD_SIZE, this machine's "
            "GPUs, or one copy of the model",
        ),
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option(metavar="GB", help="memory of a GPU that is not in this machine, as 80"),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(metavar="N", help="of one GPU, for the hours of an epoch"),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write everything as JSON too; - for stdout")
    ] = None,
    list_rules: Annotated[
        bool, typer.Option("--list", help="print all rules and what they mean")
    ] = False,
) -> None:
    """Find what is wrong with a run before it starts, from its flags, stores and machine.

    `megasft doctor`  (this machine alone)

    `megasft doctor run.yaml optim.lr=2e-5`  (the run that `megasft train` would start)

    `megasft doctor --world-size 64 --gpu-memory-gb 80 --megasft-data store --megasft-hf ckpt ...`

    All other flags are those of the run, as after `-m megasft.pretrain_sft`. Nothing is started: no
    process group, no model. Each run asks the same rules first, stops on errors (all of them at
    once) and prints warnings; notes, such as the memory estimate, are the doctor's alone.

    Exit code **0**: no errors; **1**: errors; **2**: wrong use.
    """
    console = new_console()
    if list_rules:
        with quiet():
            from megasft.checks.run.run import RULES
        print_rules(console, RULES.values())
        return
    from megasft.checks.run.subject import Wishes

    report = examine(context.args, world_size, Wishes(gpu_memory_gb, tokens_per_second))
    if json is None or str(json) != "-":
        print_report(console, report)
    if json is not None:
        _write_json(report, json)
    if report.fails():
        raise typer.Exit(1)


def examine(flags: Sequence[str], world_size: int | None, wishes: Wishes) -> Report:
    """Examine a run, or the machine alone when there are no flags.

    Args:
        flags: Of the run; or a run.yaml, and what is changed of it.
        world_size: Its ranks; those it would be started with if not given.
        wishes: What the doctor was told besides.
    """
    with quiet():
        if flags and not flags[0].startswith("-"):
            from megasft.launch.examination import examine
            from megasft.launch.run import resolve

            return examine(resolve(Path(flags[0]), flags[1:]), wishes, world_size=world_size)
        from megasft.megatron import cpu

        cpu.prepare()
        from megasft.checks.run import machine
        from megasft.checks.run.subject import Subject
        from megasft.run import start
        from megasft.training import arguments

        seen = machine.look()
        if not flags:
            return start.examine(Subject(seen, wishes))
        args = arguments.parse(flags)
        args.world_size = world_size or _world_size(args, len(seen.gpus), seen.environment)
        return start.examine(Subject(seen, wishes, args))


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing while Megatron is imported: the report says what matters of it."""
    import logging

    logging.getLogger("megasft").addHandler(logging.NullHandler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _world_size(args: Any, num_gpus: int, environment: Any) -> int:
    """Return the ranks of a run that does not say: those it would be started with, or the fewest.

    Args:
        args: Flags as parsed.
        num_gpus: GPUs of this machine.
        environment: Environment variables.
    """
    from megasft.checks.run.parallel import model_parallel

    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    tp, pp, cp = model_parallel(args)
    return max(num_gpus, max(1, tp * pp * cp))


def print_report(console: Console, report: Report) -> None:
    """Print findings by theme, the memory, what is unchecked, and the verdict."""
    from rich.text import Text

    themes = list(dict.fromkeys(finding.theme for finding in report.findings))
    for theme in themes:
        _print_theme(console, theme, [f for f in report.findings if f.theme == theme])
    _print_memory(console, report)
    for why in dict.fromkeys(item.why for item in report.unchecked):
        rules = [rule for item in report.unchecked if item.why == why for rule in item.rules]
        text = f"not checked, since {why}: {', '.join(rules)}"
        print_hanging(console, Text("", style="dim"), text, indent=4)
    print_verdict(console, report, head=_header(report))


def _header(report: Report) -> str:
    from megasft.checks.run.parameters import text_of_count

    layout = report.facts.get("layout")
    if layout is None:
        return ""
    parts = " x ".join(
        f"{name.upper()} {layout[name]}" for name in ("tp", "cp", "pp", "dp") if layout[name] > 1
    )
    experts = f", EP {layout['ep']}" if layout["ep"] > 1 else ""
    ranks = f"{layout['world_size']} rank{'' if layout['world_size'] == 1 else 's'}"
    size = f"{text_of_count(report.facts['parameters'])} parameters"
    return f"{size} on {ranks}{f' = {parts}' if parts else ''}{experts}: "


def _print_theme(console: Console, theme: str, findings: Sequence[Finding]) -> None:
    from rich.text import Text

    console.print(Text(theme, style="bold"))
    for finding in findings:
        head = Text.assemble(
            (f" {finding.severity:<8}", STYLES[finding.severity]), (finding.rule, "bold"), ": "
        )
        print_hanging(console, head, finding.fact, indent=9)
        if finding.remedy:
            head = Text.assemble(" " * 9, ("remedy: ", "dim"))
            print_hanging(console, head, finding.remedy, indent=9)
    console.print()


def _print_memory(console: Console, report: Report) -> None:
    from rich.text import Text

    from megasft.checks.run.memory import text_of_bytes

    found, there = report.facts.get("memory"), report.facts.get("gpu_memory")
    if not found:
        return
    title = f"memory of the fullest GPU (pipeline stage {found['stage']}), estimated"
    console.print(Text(title, style="bold"))
    for part in found["parts"]:
        head = f" {part['name']:<14}{text_of_bytes(part['num_bytes']):>10}  "
        print_hanging(console, Text(head), part["how"], indent=27)
    of = f"of {text_of_bytes(there)}" if there else "--gpu-memory-gb GB compares it with a GPU"
    print_hanging(
        console, Text(f" {'together':<14}{text_of_bytes(found['total']):>10}  "), of, indent=9
    )
    console.print()


def _write_json(report: Report, path: Path) -> None:
    if str(path) == "-":
        sys.stdout.write(as_json(report.as_json(), default=str).decode())
    else:
        write_json(report.as_json(), path, default=str)
