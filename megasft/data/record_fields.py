"""What stands beside the messages of a record, in every format: system, tools, category, arguments.

A key that nobody reads is no error, since data carries ids and scores; it is remembered, counted
and shown, since a key that was meant to be read looks the same (``unread_keys.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from megasft.data.conversation import (
    REASONING_KEYS,
    BadRecordError,
    Category,
    Conversation,
    Message,
    category_from_field,
    make_category,
    make_messages,
)
from megasft.data.message_forms import decoded, decoded_list, messages_of

_SYSTEM_KEYS: Final = ("system", "system_prompt", "meta_instruction")
_READ: Final = {*_SYSTEM_KEYS, "tools", "functions", "meta", "chat_template_kwargs"}
_RESERVED: Final = {"messages", "tools", "documents", "add_generation_prompt"}


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Which format to expect and which fields hold prompt and response.

    Attributes:
        format: A key of ``FORMATS``, or "auto".
        prompt_key: Field of the user's text in the prompt format.
        response_key: Field of the assistant's text in the prompt format.
        system_key: Field of the system message beside a prompt; empty for none.
        query_key: Field that continues the prompt, after a line end; empty for none.
        category_key: Field of the category, instead of ``meta``; empty for none.
        template_kwargs: JSON of an object that the chat template is given; empty for none.
        train_on: One of ``conversation.TRAIN_ON``.
    """

    format: str = "auto"
    prompt_key: str = "prompt"
    response_key: str = "response"
    system_key: str = ""
    query_key: str = ""
    category_key: str = ""
    template_kwargs: str = ""
    train_on: str = "all-turns"

    @property
    def adds_fields(self) -> bool:
        """Whether it gives a conversation more than its record's own keys do."""
        return bool(self.system_key or self.category_key or self.template_kwargs)


def conversation_of(
    record: dict[str, Any],
    raw: list[Any],
    mapping: FieldMap,
    *,
    read: tuple[str, ...],
    labels: Any = None,
    categories: Any = None,
) -> Conversation:
    """Return the conversation of a record.

    Args:
        record: All of it.
        raw: Its messages, as the format writes them.
        mapping: Which fields are named.
        read: Keys of the record that the format has read.
        labels: None, or one entry a message: whether it is trained.
        categories: None, or one entry a message: its category.

    Raises:
        BadRecordError: Something in the record breaks a rule.
    """
    messages = make_messages(messages_of(raw), labels, train_on=mapping.train_on)
    if categories is not None:
        messages = _categorized(messages, categories)
    category, tools, kwargs = Category(), None, {}
    if mapping.adds_fields or not _READ.isdisjoint(record):  # of few records
        messages = _with_system(record, messages, mapping)
        category = _category_of(record, mapping)
        tools = _tools(record)
        kwargs = template_kwargs(record.get("chat_template_kwargs"), mapping.template_kwargs)
    named = (*read, mapping.system_key, mapping.category_key)
    unread = [key for key in record if key not in _READ and key not in named]
    return Conversation(
        messages,
        category,
        tools,
        kwargs,
        unread=_but_copies(record, messages, unread) if unread else (),
        has_fields=bool(tools or kwargs or [1 for m in messages if m.extra and not _is_text(m)]),
    )


def template_kwargs(own: Any, given: str) -> dict[str, Any]:
    """Return what the chat template is given: the build's arguments, and a record's over them.

    Args:
        own: An object, its JSON, or None.
        given: JSON of an object; empty for none.

    Raises:
        BadRecordError: The record's are no object, or name what the template is given anyway.
    """
    own = decoded(own, "`chat_template_kwargs`")
    if own is None and not given:
        return {}
    if not isinstance(own, dict | None):
        raise BadRecordError("wrong type", "`chat_template_kwargs` must be an object")
    if reserved := sorted(_RESERVED & {*(own or ())}):
        raise BadRecordError(
            "wrong type", f"`chat_template_kwargs` cannot hold {', '.join(reserved)}"
        )
    return {**(json.loads(given) if given else {}), **(own or {})}


def _is_text(message: Message) -> bool:
    """Say whether thinking is all that a message holds beside its content."""
    return all(key in REASONING_KEYS and type(v) is str for key, v in message.extra.items())


def _category_of(record: dict[str, Any], mapping: FieldMap) -> Category:
    if mapping.category_key:
        return category_from_field(record, mapping.category_key)
    return make_category(decoded(record.get("meta"), "`meta`"))


def _with_system(
    record: dict[str, Any], messages: tuple[Message, ...], mapping: FieldMap
) -> tuple[Message, ...]:
    """Put the system message that stands in a field of its own before the others."""
    found = {key: record[key] for key in (mapping.system_key, *_SYSTEM_KEYS) if record.get(key)}
    if not found:
        return messages
    for key, text in found.items():
        if not isinstance(text, str):
            raise BadRecordError("wrong type", f"`{key}` must be a string, not {text!r:.40}")
    (key, system), *others = found.items()
    first = messages[0]
    if first.role == "system":
        others.append(("the first message", first.content))
    for other, text in others:
        if text != system:
            raise BadRecordError(
                "system given twice", f"`{key}` and {other} say different things; keep one of them"
            )
    return messages if first.role == "system" else (Message("system", system, False, {}), *messages)


def _categorized(messages: tuple[Message, ...], own: Any) -> tuple[Message, ...]:
    """Give each message its entry of ``categories``: a name, an id, an object or null."""
    if not isinstance(own, list) or len(own) != len(messages):
        raise BadRecordError(
            "bad category", f"`categories` must be a list of {len(messages)} (one a message)"
        )
    return tuple(
        message if entry is None else message._replace(category=_category(entry))
        for message, entry in zip(messages, own, strict=True)
    )


def _category(entry: Any) -> Category:
    if isinstance(entry, dict):
        return make_category(entry)
    return category_from_field({"categories": entry}, "categories")


def _tools(record: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools, functions = record.get("tools"), record.get("functions")
    if tools and functions:
        raise BadRecordError("wrong type", "`tools` and `functions` are both given; keep one")
    if functions:
        listed = decoded_list(functions, "`functions`")
        return tuple({"type": "function", "function": function} for function in listed)
    return tuple(decoded_list(tools, "`tools`")) or None if tools else None


def _but_copies(
    record: dict[str, Any], messages: tuple[Message, ...], unread: list[str]
) -> tuple[str, ...]:
    """Leave out keys without a value, and those that repeat a message."""
    texts = {message.content for message in messages}
    return tuple(
        key
        for key in unread
        if record[key] not in (None, "", [], {})
        and not (isinstance(record[key], str) and record[key] in texts)
    )
