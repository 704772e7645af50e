"""Options about records that several commands share; one wording, one type."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megasft.errors import FlagError


class Format(StrEnum):
    """How a record stores its conversation."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT = "prompt"
    ALPACA = "alpaca"
    FIREFLY = "firefly"
    MOSS = "moss"
    TEXT = "text"


class TrainOn(StrEnum):
    """Which assistant messages are trained."""

    ALL_TURNS = "all-turns"
    LAST_TURN = "last-turn"
    LABELS = "labels"
    EVERYTHING = "everything"


FormatOption = Annotated[Format, typer.Option(help="auto: seen record by record")]
PromptKey = Annotated[
    str, typer.Option(metavar="FIELD", help="user's text, for records without messages")
]
ResponseKey = Annotated[
    str, typer.Option(metavar="FIELD", help="assistant's text, for records without messages")
]
SystemKey = Annotated[str, typer.Option(metavar="FIELD", help="system message beside a prompt")]
QueryKey = Annotated[
    str, typer.Option(metavar="FIELD", help="continues the prompt on a line of its own")
]
CategoryKey = Annotated[
    str, typer.Option(metavar="FIELD", help="field of the category, instead of meta")
]
TrainOnOption = Annotated[
    TrainOn,
    typer.Option(
        help="all-turns: all answers but those labelled 0; last-turn: the last, unless "
        "labelled 0; labels: those labelled 1; everything: every token, prompts too"
    ),
]
TemplateKwargs = Annotated[
    str,
    typer.Option(
        metavar="JSON",
        help='given to the chat template of every record, such as {"enable_thinking": false}; a '
        "record's chat_template_kwargs come first",
    ),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Jinja file, instead of the tokenizer's own template"),
]


def checked_kwargs(text: str) -> str:
    """Return the value of --template-kwargs if it is one.

    Raises:
        FlagError: It is not the JSON of an object, or names what a template is given anyway.
    """
    from megasft.data.conversation import BadRecordError
    from megasft.data.record_fields import template_kwargs

    try:
        template_kwargs(text or None, "")
    except BadRecordError as error:
        detail = error.detail.replace("`chat_template_kwargs`", "it")
        raise FlagError(f"--template-kwargs {text}: {detail}") from None
    return text


def text_of(chat_template: Path | None) -> str:
    """Return the template in a file; empty if none is given.

    Raises:
        FlagError: It cannot be read.
    """
    if chat_template is None:
        return ""
    try:
        return chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(f"--chat-template {chat_template} cannot be read: {error}") from None
