"""``megasft mix``: conversation files to one file, sampled by a mixture, shuffled and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.cli.record_options import (
    CategoryKey,
    PromptKey,
    QueryKey,
    ResponseKey,
    SystemKey,
)
from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from megasft.data.mix import Mixed
    from megasft.mixture import Mixture

DEFAULT_SEED: Final = 42
MAX_SHOWN: Final = 20
"""Bad records printed one by one."""
Report = Callable[[int, int], None]
_NOT_PLAIN: Final = (".gz", ".zst", ".parquet", ".arrow", ".feather")


def mix(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help=".jsonl file to make")
    ],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="mixture, YAML or JSON; without it every record once"),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE...",
            help="as in megasft build; the data_path or the sources of --config if not given",
        ),
    ] = None,
    more_inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="more input files, so that --input *.jsonl works"),
    ] = None,
    join_probability: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="P", help="chance that a record joins the one before"),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"of draw, order and joining; that of --config, or {DEFAULT_SEED}"
        ),
    ] = None,
    prompt_key: PromptKey = "prompt",
    response_key: ResponseKey = "response",
    system_key: SystemKey = "",
    query_key: QueryKey = "",
    category_key: CategoryKey = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="go on without bad records")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a file that is there")
    ] = False,
) -> None:
    """Sample, shuffle and join conversations into one file for `megasft build`.

    `megasft mix --config ratio.json --input pre.jsonl --output sampled.jsonl`

    The mixture says how often the records of a category or a file are drawn: `sample_rate: 2.3` is
    two copies and a random 30 %. OpenSFT's `ratio` file is read as it is. The same file works for
    stores without tokenizing again (`--megasft-mixture`); a file is the better choice if you join:

    `--join-probability 0.3` makes pseudo multi-turn: each record joins the one before with this
    chance, unless their system messages or tools differ. A repeated system message is dropped;
    labels stay, and each message keeps its category.
    """
    from rich.console import Console

    from megasft.data.formats import FieldMap
    from megasft.data.mix import MixOptions
    from megasft.data.mix import mix as mix_files
    from megasft.mixture import read_mixture

    if output.suffix in _NOT_PLAIN:
        raise FlagError(f"--output {output}: plain jsonl is written; give it a .jsonl name")
    mixture = None if config is None else read_mixture(config)
    options = MixOptions(
        inputs=_inputs([*(inputs or ()), *(more_inputs or ())], mixture),
        output=output,
        seed=_seed(seed, mixture),
        mixture=mixture,
        join_probability=join_probability,
        fields=FieldMap(
            prompt_key=prompt_key,
            response_key=response_key,
            system_key=system_key,
            query_key=query_key,
            category_key=category_key,
        ),
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with _bars(console) as (on_bytes, on_record):
        mixed = mix_files(
            options, on_bytes=on_bytes, on_record=on_record, on_rejected=_complaints(console)
        )
    for warning in mixed.warnings:
        console.print(f"warning: {warning}", markup=False)
    _print_result(output, mixed)


def _inputs(named: list[str], mixture: Mixture | None) -> tuple[str, ...]:
    if named:
        return tuple(named)
    if mixture is None:
        raise FlagError("nothing to read; give --input, or a --config that names its data")
    return tuple(mixture.inputs())


def _seed(seed: int | None, mixture: Mixture | None) -> int:
    of_file = None if mixture is None else mixture.seed
    if None not in (seed, of_file) and seed != of_file:
        raise FlagError(f"--seed is {seed}, and --config has seed {of_file}; drop one of them")
    return next((s for s in (seed, of_file) if s is not None), DEFAULT_SEED)


def _complaints(console: Console) -> Callable[[str, str], None]:
    """Return what prints the first bad records as they come, and says when it stops."""
    count = 0

    def complain(place: str, message: str) -> None:
        nonlocal count
        count += 1
        if count <= MAX_SHOWN:
            console.print(f"{place}: {message}", markup=False)
        elif count == MAX_SHOWN + 1:
            console.print("... more bad records follow, not printed one by one")

    return complain


@contextmanager
def _bars(console: Console) -> Iterator[tuple[Report, Report]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        read, write = (progress.add_task(name, total=None) for name in ("read", "write"))
        yield _report(progress, read), _report(progress, write)


def _report(progress: Progress, task: TaskID) -> Report:
    """Return what moves a bar, by whole per cents: a bar costs more than a record."""
    shown = -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        if total and 100 * done // total != shown:
            shown = 100 * done // total
            progress.update(task, completed=done, total=total)

    return report


def _print_result(output: Path, mixed: Mixed) -> None:
    print(
        f"{output}: {mixed.num_written:,} conversations of {mixed.num_drawn:,} records drawn, "
        f"from {mixed.num_read:,} read"
    )
    width = max(len(row.name) for row in mixed.categories)
    print(f"  {'category':<{max(width, 8)}}{'before':>12}{'after':>12}")
    for row in mixed.categories:
        print(f"  {row.name:<{max(width, 8)}}{row.found:>12,}{row.drawn:>12,}")
    print(
        f"  turns a conversation: {mixed.turns_read / mixed.num_read:.2f} before, "
        f"{mixed.turns_drawn / mixed.num_written:.2f} after"
    )
    for reason, num in sorted(mixed.rejected.items()):
        print(f"  left out {num:,} x {reason}")
