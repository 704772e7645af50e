"""Joins conversations that follow each other to longer ones: pseudo multi-turn, as OpenSFT has it.

A chain grows as long as coins say so and the next conversation fits behind it: both have the same
system message (the repeated one is dropped) or none, the same tools, and the chain ends with an
answer. A conversation without a system message does not join one that has it: it was not asked
under that instruction. Nor does one join its own copy, which would teach to repeat oneself, or
grow beyond what a record may be.

A joined record is in the ``messages`` format, whatever its parts were. Each message keeps its label
(``labels``, or ``label`` at the messages that had one) and the category of the conversation it
comes from (``categories``, one entry a message); other fields of the records are not carried over.
A conversation that stays alone is written as it was read, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from megasft.data import exact_json
from megasft.data.conversation import (
    MAX_RECORD_BYTES,
    BadRecordError,
    Category,
    Conversation,
    Message,
)
from megasft.data.formats import FieldMap, parse


class _Link(NamedTuple):
    """A record, and what it says; None when nothing may join it."""

    raw: bytes
    conversation: Conversation | None


def join(records: Iterable[bytes], coins: Iterable[bool], fields: FieldMap) -> Iterator[bytes]:
    """Yield the records, some of them joined to the one before.

    Args:
        records: JSON objects, in the order they are written.
        coins: Whether each record is to join the one before, if it can.
        fields: How records are read.
    """
    chain: list[_Link] = []
    for raw, is_wanted in zip(records, coins, strict=True):
        link = _Link(raw, _conversation(raw, fields))
        if chain and not (is_wanted and _fits(chain, link)):
            yield _written(chain)
            chain = []
        chain.append(link)
    if chain:
        yield _written(chain)


def _conversation(raw: bytes, fields: FieldMap) -> Conversation | None:
    try:
        return parse(raw, fields)
    except BadRecordError:
        return None  # such as one whose labels are all 0: it is written as it is


def _fits(chain: list[_Link], link: _Link) -> bool:
    last, new = chain[-1].conversation, link.conversation
    return (
        last is not None
        and new is not None
        and _system(chain[0].conversation) == _system(new)
        and last.tools == new.tools
        and last.template_kwargs == new.template_kwargs
        and not (last.is_text or new.is_text)
        and last.messages[-1].role == "assistant"
        and all(link.raw != other.raw for other in chain)
        and 2 * (sum(len(other.raw) for other in chain) + len(link.raw)) < MAX_RECORD_BYTES
    )


def _system(conversation: Conversation | None) -> tuple[str | None, Any] | None:
    first = conversation.messages[0] if conversation else None
    return (first.content, first.extra) if first and first.role == "system" else None


def _written(chain: list[_Link]) -> bytes:
    if len(chain) == 1:
        return chain[0].raw
    messages: list[Message] = []
    labelled: list[bool] = []
    categories: list[Category] = []
    for number, (_, conversation) in enumerate(chain):
        assert conversation is not None
        skipped = 1 if number and conversation.messages[0].role == "system" else 0
        messages += conversation.messages[skipped:]
        labelled += [message.labelled for message in conversation.messages[skipped:]]
        own = [message.category or conversation.category for message in conversation.messages]
        categories += own[skipped:]
    answers = [has for has, m in zip(labelled, messages, strict=True) if m.role == "assistant"]
    if all(answers):
        listed, inline = {"labels": [_label(m) for m in messages]}, [False] * len(messages)
    else:
        listed, inline = {}, labelled
    first = chain[0].conversation
    beside = {"tools": first.tools, "chat_template_kwargs": first.template_kwargs} if first else {}
    record: dict[str, Any] = {
        "messages": [_message(m, inline[i]) for i, m in enumerate(messages)],
        **listed,
        "categories": [_entry(category) for category in categories],
        **{key: value for key, value in beside.items() if value},
    }
    return exact_json.dump(record)


def _message(message: Message, has_label: bool) -> dict[str, Any]:
    label = {"label": _label(message)} if has_label else {}
    return {"role": message.role, "content": message.content, **message.extra, **label}


def _label(message: Message) -> float:
    if message.trained and message.weight != 1:
        return message.weight
    return int(message.trained)


def _entry(category: Category) -> dict[str, Any] | str | int | None:
    if category.id is not None and category.name is not None:
        return {"category_id": category.id, "category_name": category.name}
    return category.name if category.id is None else category.id
