"""``megasft build``: conversation files to a token store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from megasft.cli.record_options import (
    CategoryKey,
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
from megasft.errors import FlagError

if TYPE_CHECKING:
    from rich.console import Console

    from megasft.data.build import BuildOptions, Tally
    from megasft.data.held_out import Both
    from megasft.data.remote import Location
    from megasft.data.too_long import Limit

MAX_SHOWN: Final = 20
"""Bad records printed one by one; the others are in the .rejected.jsonl file."""
_BYTES_PER_WORKER: Final = 32 * 2**20
"""Starting a process costs a second, in which the others tokenize some 40 MB."""
_MAX_WORKERS: Final = 8


class InText(StrEnum):
    """What to do with special tokens written as text."""

    ESCAPE = "escape"
    REJECT = "reject"
    KEEP = "keep"


class TooLong(StrEnum):
    """What to do with a conversation longer than --max-tokens."""

    TRUNCATE_TURNS = "truncate-turns"
    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


class StrippedThinking(StrEnum):
    """What to do with a trained answer whose thinking the template leaves out."""

    MASK = "mask"
    TRAIN = "train"
    REJECT = "reject"


class Render(StrEnum):
    """How conversations are rendered."""

    AUTO = "auto"
    JINJA = "jinja"


class Encoder(StrEnum):
    """What encodes the renders."""

    AUTO = "auto"
    TOKENIZERS = "tokenizers"


def build(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            metavar="FILE...",
            help="jsonl, JSON list (.gz, .zst), parquet, arrow; a folder or 'glob' of them; "
            "s3://, gs://, https://; hub:openai/gsm8k/main[train]",
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="folder of the model's tokenizer")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="folder to make")],
    more_inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="more input files, so that --input *.jsonl works"),
    ] = None,
    format: FormatOption = Format.AUTO,
    prompt_key: PromptKey = "prompt",
    response_key: ResponseKey = "response",
    system_key: SystemKey = "",
    query_key: QueryKey = "",
    train_on: TrainOnOption = TrainOn.ALL_TURNS,
    category: Annotated[
        str, typer.Option(metavar="NAME", help="category of records that name none")
    ] = "",
    category_key: CategoryKey = "",
    category_from_file: Annotated[
        bool,
        typer.Option("--category-from-file", help="the file's name, for records that name none"),
    ] = False,
    special_tokens_in_text: Annotated[
        InText,
        typer.Option(
            help="a text that holds e.g. <|im_end|>: escape makes plain text of it, reject rejects "
            "the record, keep lets it become the control token"
        ),
    ] = InText.ESCAPE,
    chat_template: TemplateOption = None,
    template_kwargs: TemplateKwargs = "",
    stripped_thinking: Annotated[
        StrippedThinking,
        typer.Option(
            help="an answer whose thinking the template leaves out (Qwen3's does, in earlier "
            "turns): mask does not train it, train trains it without, reject rejects the record"
        ),
    ] = StrippedThinking.MASK,
    mask_thinking: Annotated[
        bool, typer.Option("--mask-thinking", help="train answers without their thinking")
    ] = False,
    mask_tool_calls: Annotated[
        bool, typer.Option("--mask-tool-calls", help="train answers without their tool calls")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="longest sample; 0: any length")
    ] = 0,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="longest prompt of a turn; 0: any length")
    ] = 0,
    max_answer_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="longest answer; 0: any length")
    ] = 0,
    too_long: Annotated[
        TooLong,
        typer.Option(
            help="beyond --max-*-tokens: truncate-turns cuts behind the last turn that fits (drops "
            "if none does), drop, truncate cuts anywhere, error rejects the record"
        ),
    ] = TooLong.TRUNCATE_TURNS,
    valid_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="F",
            help="hold out about this share of the conversations, by a hash of what they say, and "
            "make the store OUTPUT-valid of them",
        ),
    ] = 0,
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
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="workers on a Ray cluster: auto, HOST:PORT, ray://..., or local"
        ),
    ] = "",
    render: Annotated[
        Render,
        typer.Option(help="auto learns the template and checks samples; jinja checks every render"),
    ] = Render.AUTO,
    encoder: Annotated[
        Encoder, typer.Option(help="auto: gigatoken for byte-level BPE, checked; else tokenizers")
    ] = Encoder.AUTO,
) -> None:
    """Make a token store from conversations: render the chat template once, tokenize, find answers.

    `megasft build --input chats.jsonl --tokenizer ./Qwen3-0.6B --output store`

    A line is `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ...}]}`; roles
    are system, user, assistant and tool. Each record may be of another format: `messages`,
    `sharegpt` (`conversations`, `from`, `value`), `alpaca` (`instruction`, `input`, `output`,
    `history`), `prompt` (`prompt` with `response`, `answer` or `completion`; `question` with
    `answer`), `firefly`, `moss`, or `text` (pretraining). Other fields are named: `--prompt-key
    ask --response-key reply`. Every assistant message and its end-of-turn token is trained, unless
    its `weight`, `"labels": [0, 0, 1, ...]` (one a message) or `--train-on` says otherwise. Keys
    that nobody reads are counted and listed.

    **Bad records:** all input is read and each bad record reported as file:line with its reason. If
    there is one, no store is made and the exit code is 1; `--skip-bad` makes the store without
    them and counts them by reason in store.json. All of them are listed in STORE.rejected.jsonl.

    **Validation:** `--valid-fraction 0.02` makes a second store, STORE-valid. So does a folder with
    files such as train.json and eval.json, of the latter.
    """
    from rich.console import Console

    from megasft.data.build import BuildOptions
    from megasft.data.build import build as build_store
    from megasft.data.formats import FieldMap
    from megasft.data.held_out import build_both
    from megasft.data.inputs import find_splits
    from megasft.data.render import RenderOptions
    from megasft.data.tokenize import Recipe

    _require_effect(format, (prompt_key, response_key), (system_key, query_key))
    if train_on is TrainOn.EVERYTHING and (mask_thinking or mask_tool_calls):
        raise FlagError("--mask-thinking and --mask-tool-calls have no effect on everything")
    if category and category_from_file:
        raise FlagError("--category and --category-from-file name the same thing; drop one")
    train_files, valid_files = find_splits((*inputs, *(more_inputs or ())))
    if valid_fraction and valid_files:
        raise FlagError(f"{inputs[0]} has files held out already; drop --valid-fraction")
    files = tuple(train_files)
    fields = FieldMap(
        format.value,
        prompt_key,
        response_key,
        system_key,
        query_key,
        category_key,
        checked_kwargs(template_kwargs),
        train_on.value,
    )
    recipe = Recipe(
        tokenizer,
        fields,
        special_tokens_in_text=special_tokens_in_text.value,
        chat_template=text_of(chat_template),
        rendering=RenderOptions(
            stripped_thinking.value, render is Render.JINJA, mask_thinking, mask_tool_calls
        ),
        limit=_limit(too_long, max_tokens, max_prompt_tokens, max_answer_tokens),
        encoder=encoder.value,
    )
    options = BuildOptions(
        inputs=files,
        output=output,
        recipe=recipe,
        num_workers=workers if ray else workers or _fitting_workers(files),
        ray=ray,
        skip_bad=skip_bad,
        overwrite=overwrite,
        category=category,
        category_from_file=category_from_file,
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    held_out = _held_out(options, tuple(valid_files), valid_fraction)
    complain = _Complaints(console)

    def make(wanted: BuildOptions, files: tuple[Location, ...]) -> Tally:
        with _bar(console, files) as on_bytes:
            return build_store(wanted, on_bytes=on_bytes, on_rejected=complain)

    if held_out is None:
        _print_result(options, make(options, files))
        return
    train, valid = held_out
    both = build_both(
        lambda: make(train, files),
        lambda: make(valid, tuple(valid_files) or files),
        valid.output,
    )
    _print_result(train, both.train)
    _print_result(valid, both.valid)


def _require_effect(format: Format, pair: tuple[str, str], beside: tuple[str, str]) -> None:
    if format not in (Format.AUTO, Format.PROMPT) and pair != ("prompt", "response"):
        raise FlagError(f"--prompt-key and --response-key have no effect with --format {format}")
    system_key, query_key = beside
    if query_key and format not in (Format.AUTO, Format.PROMPT, Format.ALPACA):
        raise FlagError(f"--query-key has no effect with --format {format}")
    if system_key and format is Format.TEXT:
        raise FlagError("--system-key has no effect with --format text")


def _held_out(
    options: BuildOptions, files: tuple[Location, ...], fraction: float
) -> Both[BuildOptions] | None:
    """Return how both stores are made; None if nothing is held out."""
    from megasft.data.held_out import Both, Part, valid_output

    output = valid_output(options.output)
    if files:
        return Both(options, replace(options, inputs=files, output=output))
    if not fraction:
        return None
    train, valid = (
        replace(options, recipe=replace(options.recipe, part=Part(fraction, is_valid)))
        for is_valid in (False, True)
    )
    return Both(train, replace(valid, output=output))


def _limit(too_long: TooLong, max_tokens: int, max_prompt: int, max_answer: int) -> Limit:
    from megasft.data.too_long import Limit

    if not (max_tokens or max_prompt or max_answer) and too_long is not TooLong.TRUNCATE_TURNS:
        raise FlagError(
            f"--too-long {too_long.value} has no effect without --max-tokens, --max-prompt-tokens "
            "or --max-answer-tokens; say how long a sample may be"
        )
    return Limit(max_tokens, too_long.value, max_prompt, max_answer)


def _fitting_workers(files: tuple[Location, ...]) -> int:
    from megasft.data.remote import size_of

    num_bytes = sum(map(size_of, files))
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
def _bar(console: Console, files: tuple[Location, ...]) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from megasft.data.remote import size_of

    total = sum(map(size_of, files)) or None
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("build", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _print_result(options: BuildOptions, tally: Tally) -> None:
    from megasft.data import unread_keys
    from megasft.store import open_store

    share = 100 * tally.label_tokens / tally.tokens
    print(
        f"{options.output}: {tally.samples:,} samples, {tally.turns:,} turns, "
        f"{tally.tokens:,} tokens, {tally.label_tokens:,} trained ({share:.1f} %)"
    )
    if weights := open_store(options.output).weights:
        print(f"  {weights}")
    if tally.truncated or tally.dropped:
        print(
            f"  too long: {tally.truncated:,} cut, {tally.dropped:,} dropped; lost "
            f"{tally.lost_tokens:,} tokens, {tally.lost_labels:,} of them trained"
        )
    if tally.stripped_turns:
        print(
            f"  {tally.stripped_turns:,} answers are not trained: the template leaves out their "
            "thinking (--stripped-thinking train trains them without)"
        )
    for line in unread_keys.lines_of(unread_keys.as_meta(tally.unread)):
        print(f"  not read: {line}")
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
