"""``megasft build``: conversation files to a token store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.data.build import BuildOptions, Tally

MAX_SHOWN: Final = 20
"""Bad records printed one by one; the others are in the .rejected.jsonl file."""
_BYTES_PER_WORKER: Final = 16 * 2**20
"""Starting a process costs three seconds, in which the others tokenize some 5 MB."""
_MAX_WORKERS: Final = 8


class Format(StrEnum):
    """How a record stores its conversation."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT = "prompt"
    ALPACA = "alpaca"


class TrainOn(StrEnum):
    """Which assistant messages are trained."""

    ALL_TURNS = "all-turns"
    LAST_TURN = "last-turn"
    LABELS = "labels"


class InText(StrEnum):
    """What to do with special tokens written as text."""

    REJECT = "reject"
    KEEP = "keep"


def build(
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            "-i",
            metavar="FILE...",
            help="jsonl, JSON list (.gz, .zst), parquet, arrow; a folder or 'glob' of them",
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="folder of the model's tokenizer")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="folder to make")],
    more_inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="more input files, so that --input *.jsonl works"),
    ] = None,
    format: Annotated[Format, typer.Option(help="auto: seen record by record")] = Format.AUTO,
    prompt_key: Annotated[
        str, typer.Option(metavar="FIELD", help="user's text, for records without messages")
    ] = "prompt",
    response_key: Annotated[
        str, typer.Option(metavar="FIELD", help="assistant's text, for records without messages")
    ] = "response",
    system_key: Annotated[
        str, typer.Option(metavar="FIELD", help="system message beside a prompt")
    ] = "",
    query_key: Annotated[
        str, typer.Option(metavar="FIELD", help="continues the prompt on a line of its own")
    ] = "",
    train_on: Annotated[
        TrainOn,
        typer.Option(
            help="all-turns: all answers but those labelled 0; last-turn: the last, unless "
            "labelled 0; labels: those labelled 1"
        ),
    ] = TrainOn.ALL_TURNS,
    category: Annotated[
        str, typer.Option(metavar="NAME", help="category of records that name none")
    ] = "",
    category_key: Annotated[
        str, typer.Option(metavar="FIELD", help="field of the category, instead of meta")
    ] = "",
    category_from_file: Annotated[
        bool,
        typer.Option("--category-from-file", help="the file's name, for records that name none"),
    ] = False,
    special_tokens_in_text: Annotated[
        InText,
        typer.Option(help="a text that holds e.g. <|im_end|>: reject the record, or keep it as is"),
    ] = InText.REJECT,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="make the store without the bad records")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a store that is there")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(min=0, help="processes; 0: one per core, up to 8, fewer for small inputs"),
    ] = 0,
) -> None:
    """Make a token store from conversations: render the chat template once, tokenize, find answers.

    `megasft build --input chats.jsonl --tokenizer ./Qwen3-0.6B --output store`

    A line is `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ...}]}`; roles
    are system, user, assistant and tool. Each record may be of another format: `messages`,
    `sharegpt` (`conversations`, `from`, `value`), `alpaca` (`instruction`, `input`, `output`,
    `system`, `history`) or `prompt` (`prompt` with `response`, `answer` or `completion`;
    `question` with `answer`). Other fields are named: `--prompt-key ask --response-key reply`.
    Every assistant message and its end-of-turn token is trained, unless `"labels": [0, 0, 1, ...]`
    (one a message) or `--train-on` says otherwise.

    **Bad records:** all input is read and each bad record reported as file:line with its reason. If
    there is one, no store is made and the exit code is 1; `--skip-bad` makes the store without
    them and counts them by reason in store.json. All of them are listed in STORE.rejected.jsonl.
    """
    from rich.console import Console

    from megasft.data.build import BuildOptions
    from megasft.data.build import build as build_store
    from megasft.data.formats import FieldMap
    from megasft.data.inputs import find_files
    from megasft.data.tokenize import Recipe

    _require_effect(format, (prompt_key, response_key), (system_key, query_key))
    if category and category_from_file:
        raise FlagError("--category and --category-from-file name the same thing; drop one")
    files = tuple(find_files((*inputs, *(more_inputs or ()))))
    fields = FieldMap(
        format.value,
        prompt_key,
        response_key,
        system_key,
        query_key,
        category_key,
        train_on.value,
    )
    keep = special_tokens_in_text is InText.KEEP
    options = BuildOptions(
        inputs=files,
        output=output,
        recipe=Recipe(tokenizer, fields, keep),
        num_workers=workers or _fitting_workers(files),
        skip_bad=skip_bad,
        overwrite=overwrite,
        category=category,
        category_from_file=category_from_file,
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with _bar(console, files) as on_bytes:
        tally = build_store(options, on_bytes=on_bytes, on_rejected=_Complaints(console))
    _print_result(options, tally)


def _require_effect(format: Format, pair: tuple[str, str], beside: tuple[str, str]) -> None:
    if format not in (Format.AUTO, Format.PROMPT) and pair != ("prompt", "response"):
        raise FlagError(f"--prompt-key and --response-key have no effect with --format {format}")
    if format in (Format.MESSAGES, Format.SHAREGPT) and any(beside):
        raise FlagError(f"--system-key and --query-key have no effect with --format {format}")


def _fitting_workers(files: tuple[Path, ...]) -> int:
    num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    cores = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    return min(cores, 1 + num_bytes // _BYTES_PER_WORKER)


class _Complaints:
    """Prints the first bad records as they come, and says when it stops printing."""

    def __init__(self, console: Console) -> None:
        self._console, self._count = console, 0

    def __call__(self, place: str, message: str) -> None:
        self._count += 1
        if self._count <= MAX_SHOWN:
            self._console.print(f"{place}: {message}", markup=False)
        elif self._count == MAX_SHOWN + 1:
            self._console.print("... more bad records follow, not printed one by one")


@contextmanager
def _bar(console: Console, files: tuple[Path, ...]) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    total = sum(path.stat().st_size for path in files if path.is_file())
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("build", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _print_result(options: BuildOptions, tally: Tally) -> None:
    share = 100 * tally.label_tokens / tally.tokens
    print(
        f"{options.output}: {tally.samples:,} samples, {tally.turns:,} turns, "
        f"{tally.tokens:,} tokens, {tally.label_tokens:,} trained ({share:.1f} %)"
    )
    for reason, count in sorted(tally.rejected.items()):
        print(f"  rejected {count:,} x {reason} (listed in {options.rejected_path})")
    if tally.turns_without_stop:
        print(
            f"  {tally.turns_without_stop:,} turns end without a stop token: the template has none"
        )
    if tally.border_tokens:
        print(
            f"  {tally.border_tokens:,} tokens lie half in an answer and are not trained: "
            "the template glues them together"
        )
