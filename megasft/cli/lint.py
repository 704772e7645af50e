"""``megasft lint``: what is wrong with a token store or with conversation files, for CI too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megasft.cli.findings_output import STYLES, new_console, print_rules, print_verdict, write_json
from megasft.cli.record_options import (
    Format,
    FormatOption,
    PromptKey,
    QueryKey,
    ResponseKey,
    SystemKey,
    TemplateKwargs,
    TemplateOption,
    TrainOn,
    TrainOnOption,
    checked_kwargs,
    text_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.checks.engine import Finding, Report, Unchecked


def lint(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="STORE|FILE...", help="a folder made by megasft build, or its inputs"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="needed for files; for a store, if it was moved"),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="samples whose text is read; 0: all")
    ] = 2_000,
    strict: Annotated[bool, typer.Option("--strict", help="fail on warnings too")] = False,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="leave a rule out; may be repeated")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the findings as JSON too")
    ] = None,
    list_rules: Annotated[
        bool, typer.Option("--list", help="print all rules and what they mean")
    ] = False,
    format: FormatOption = Format.AUTO,
    prompt_key: PromptKey = "prompt",
    response_key: ResponseKey = "response",
    system_key: SystemKey = "",
    query_key: QueryKey = "",
    train_on: TrainOnOption = TrainOn.ALL_TURNS,
    chat_template: TemplateOption = None,
    template_kwargs: TemplateKwargs = "",
) -> None:
    """Find what is wrong with training data although it builds.

    `megasft lint store`

    `megasft lint chats.jsonl more.jsonl --tokenizer ./Qwen3-0.6B --strict --json lint.json`

    One line a finding: how bad, which rule, how often, where first. Then what each means, and the
    remedy. Rules over token ids see every sample; rules over text and over the source files see
    `--sample` of them. Masks are checked against transformers' own `apply_chat_template`: nothing
    before the end of the generation prompt may be trained, and the first token behind it must be.

    Exit code **0**: clean, or notes alone; **1**: errors (with `--strict`, warnings); **2**: wrong
    use.
    """
    from megasft.checks.data.run import RULES, LintOptions
    from megasft.data.formats import FieldMap

    console = new_console()
    if list_rules:
        print_rules(console, RULES.values())
        return
    for name in ignore or ():
        if name not in RULES:
            raise typer.BadParameter(f"--ignore {name}: no such rule; --list prints all")
    fields = FieldMap(
        format=format.value,
        prompt_key=prompt_key,
        response_key=response_key,
        system_key=system_key,
        query_key=query_key,
        template_kwargs=checked_kwargs(template_kwargs),
        train_on=train_on.value,
    )
    options = LintOptions(
        tokenizer, sample, fields, frozenset(ignore or ()), text_of(chat_template)
    )
    report = _lint(paths or [], options)
    _print_report(console, report)
    if json is not None:
        write_json(report.as_json(), json)
    if report.fails(strict=strict):
        raise typer.Exit(1)


def _lint(paths: list[Path], options: Any) -> Report:
    from megasft.checks.data.run import lint_files, lint_store
    from megasft.store import META, open_store

    if not paths:
        raise typer.BadParameter("name a store, or files")
    stores = [path for path in paths if (path / META).is_file()]
    if stores and len(paths) > 1:
        raise typer.BadParameter(f"{stores[0]} is a store; lint takes one store, or files")
    if stores and options.chat_template:
        raise typer.BadParameter("--chat-template has no effect on a store, which knows its own")
    if stores:
        return lint_store(open_store(stores[0]), options)
    if options.tokenizer is None:
        raise typer.BadParameter(f"{paths[0]} is no store, and files need --tokenizer DIR")
    return lint_files(tuple(paths), options)


def _print_report(console: Console, report: Report) -> None:
    if report.findings:
        _print_table(console, report.findings)
        console.print()
    for finding in report.findings:
        _print_finding(console, finding)
    for item in report.unchecked:
        _print_unchecked(console, item)
    sampled, total = report.counts.get("sampled", 0), report.counts["samples"]
    if 0 < sampled < total:
        console.print(f"text: {sampled:,} of {total:,} samples were read (--sample 0 reads all)")
    print_verdict(console, report)


def _print_table(console: Console, findings: tuple[Finding, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("severity", "rule", "count", "share", "first example"):
        right = title in ("count", "share")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for finding in findings:
        table.add_row(
            Text(finding.severity, style=STYLES[finding.severity]),
            finding.rule,
            finding.amount,
            _share(finding.share),
            Text(finding.examples[0] if finding.examples else "-", overflow="fold"),
        )
    console.print(table)


def _print_finding(console: Console, finding: Finding) -> None:
    from rich.text import Text

    style = STYLES[finding.severity]
    looked_at = " looked at" if finding.sampled else ""
    head = (
        f"{finding.count:,} of {finding.population:,} {finding.unit}{looked_at} "
        f"({_share(finding.share)})"
    )
    lines = [("", head), ("remedy: ", finding.remedy)]
    lines += [("here: ", finding.detail)] if finding.detail else []
    lines += [("at: ", ", ".join(finding.examples))] if finding.examples else []
    console.print(Text.assemble((finding.rule, style), ": ", finding.fact), soft_wrap=True)
    for name, text in lines:
        console.print(Text.assemble("  ", (name, "dim"), text), soft_wrap=True)


def _print_unchecked(console: Console, item: Unchecked) -> None:
    text = f"not checked: {', '.join(item.rules)} ({item.why})"
    console.print(text, style="dim", markup=False, soft_wrap=True)


def _share(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
