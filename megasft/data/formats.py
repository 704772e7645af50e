"""From a record as people store it to a conversation: one adapter a format.

    messages   {"messages": [{"role": "user", "content": ...}, ...], "labels": [...], "tools": ...}
    sharegpt   {"conversations": [{"from": "human", "value": ...}], "system": ..., "tools": ...}
    prompt     {"question": ..., "answer": ...} with --prompt-key question --response-key answer

The format is found record by record from the field it starts with, so one file may mix them;
``--format`` insists on one. A record may carry ``meta.category_id`` and ``meta.category_name``
in every format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from megasft.data.conversation import (
    LABEL_KEYS,
    BadRecordError,
    Conversation,
    make_category,
    make_messages,
)

SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's ``from`` to a role."""


@dataclass(frozen=True, slots=True)
class FieldMap:
    """Which format to expect and which fields hold prompt and response.

    Attributes:
        format: A key of ``FORMATS``, or "auto".
        prompt_key: Field of the user's text in the prompt format.
        response_key: Field of the assistant's text in the prompt format.
    """

    format: str = "auto"
    prompt_key: str = "prompt"
    response_key: str = "response"


def parse(line: bytes, mapping: FieldMap) -> Conversation:
    """Turn the bytes of one record into a valid conversation.

    Raises:
        BadRecordError: The record breaks a rule; the message says which.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRecordError("not JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRecordError("not an object", f"a record is an object, this is {_kind(record)}")
    return FORMATS[_format_of(record, mapping)](record, mapping)


def _format_of(record: dict[str, Any], mapping: FieldMap) -> str:
    if mapping.format != "auto":
        return mapping.format
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if mapping.prompt_key in record and mapping.response_key in record:
        return "prompt"
    raise BadRecordError(
        "missing field",
        f"no `messages`, no `conversations`, and not both of `{mapping.prompt_key}` and "
        f"`{mapping.response_key}` (--prompt-key, --response-key); "
        f"it has {', '.join(f'`{key}`' for key in list(record)[:8]) or 'no field'}",
    )


def _from_messages(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = _list(record, "messages")
    return _conversation(record, raw, record.get("labels"), record.get("tools"))


def _from_sharegpt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = [_spoken(item, i) for i, item in enumerate(_list(record, "conversations"))]
    labels, system = record.get("labels"), record.get("system")
    if system:
        raw = [{"role": "system", "content": system}, *raw]
        labels = [0, *labels] if isinstance(labels, list) else labels
    tools = record.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as error:
            raise BadRecordError("wrong type", f"`tools` is not JSON: {error}") from None
    return _conversation(record, raw, labels, tools)


def _from_prompt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    for key in (mapping.prompt_key, mapping.response_key):
        if record.get(key) is None:
            raise BadRecordError("missing field", f"no `{key}`")
    raw = [
        {"role": "user", "content": record[mapping.prompt_key]},
        {"role": "assistant", "content": record[mapping.response_key]},
    ]
    return _conversation(record, raw, None, None)


Adapter = Callable[[dict[str, Any], FieldMap], Conversation]

FORMATS: Final[dict[str, Adapter]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt": _from_prompt,
}


def _conversation(record: dict[str, Any], raw: list[Any], labels: Any, tools: Any) -> Conversation:
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise BadRecordError("wrong type", "`tools` must be a list of objects")
    messages = make_messages(raw, labels)
    category = make_category(record.get("meta"))
    return Conversation(messages, category, tuple(tools) if tools else None)


def _spoken(item: Any, index: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRecordError("wrong type", f"message {index} is not an object")
    for key in ("from", "value"):
        if key not in item:
            raise BadRecordError("missing field", f"message {index} has no `{key}`")
    speaker = item["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise BadRecordError(
            "unknown role", f"message {index} is from {speaker!r}; known are {known}"
        )
    labels = {key: item[key] for key in LABEL_KEYS if key in item}
    return {"role": SPEAKERS[speaker], "content": item["value"], **labels}


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if key not in record:
        raise BadRecordError("missing field", f"no `{key}`")
    if not isinstance(record[key], list):
        raise BadRecordError("wrong type", f"`{key}` must be a list, not {_kind(record[key])}")
    if not record[key]:
        raise BadRecordError("no assistant turn", f"`{key}` is empty")
    return list(record[key])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value))
