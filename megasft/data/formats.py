"""From a record as people store it to a conversation: one adapter a format.

    messages   {"messages": [{"role": "user", "content": ...}, ...], "labels": [...], "tools": ...,
                "categories": [...]}; labels and categories, where given, have one entry a message
    sharegpt   {"conversations": [{"from": "human", "value": ...}], "system": ..., "tools": ...}
    prompt     {"prompt": ..., "response": ...}; --prompt-key, --response-key, and, where wanted,
               --system-key and --query-key name other fields
    alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a]]}

The format is found record by record from the fields it has, so one file may mix them; ``--format``
insists on one. Named fields come before the well-known ones. Formats that used to bring their own
template (``Q: ... A: ...``, Alpaca's "Below is an instruction") lose it: the chat template of the
tokenizer is what the model is asked with later. An earlier turn of ``history`` is trained as any
other. A record may carry ``meta.category_id`` and ``meta.category_name`` in every format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from megasft.data.conversation import (
    LABEL_KEYS,
    MAX_RECORD_BYTES,
    BadRecordError,
    Category,
    Conversation,
    Message,
    category_from_field,
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

PAIRS: Final = (
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("question", "answer"),
)
"""Fields of prompt and response that are known without being named."""
_DEFAULT_PAIR: Final = PAIRS[0]


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
        train_on: One of ``conversation.TRAIN_ON``.
    """

    format: str = "auto"
    prompt_key: str = "prompt"
    response_key: str = "response"
    system_key: str = ""
    query_key: str = ""
    category_key: str = ""
    train_on: str = "all-turns"


def parse(line: bytes, mapping: FieldMap) -> Conversation:
    """Turn the bytes of one record into a valid conversation.

    Raises:
        BadRecordError: The record breaks a rule; the message says which.
    """
    if len(line) > MAX_RECORD_BYTES:
        raise BadRecordError(
            "record too long",
            f"it is longer than {MAX_RECORD_BYTES // 2**20} MiB; a record of a .jsonl file ends "
            "with its line",
        )
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRecordError("not JSON", _why_not_json(line, error)) from None
    if not isinstance(record, dict):
        raise BadRecordError("not an object", f"a record is an object, this is {_kind(record)}")
    return FORMATS[_format_of(record, mapping)](record, mapping)


def _format_of(record: dict[str, Any], mapping: FieldMap) -> str:
    if mapping.format != "auto":
        return mapping.format
    if record.get("messages") is not None:
        return "messages"
    if record.get("conversations") is not None:
        return "sharegpt"
    named = (mapping.prompt_key, mapping.response_key)
    if named != _DEFAULT_PAIR and _has(record, named):
        return "prompt"
    if _has(record, ("instruction", "output")):
        return "alpaca"
    if _has(record, named) or any(_has(record, pair) for pair in PAIRS):
        return "prompt"
    raise BadRecordError(
        "missing field",
        f"no `messages`, no `conversations`, no `instruction` with `output`, and not both of "
        f"`{mapping.prompt_key}` and `{mapping.response_key}` (--prompt-key, --response-key); "
        f"it has {', '.join(map(_shown, list(record.items())[:8])) or 'no field'}",
    )


def _from_messages(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = _list(record, "messages")
    made = _conversation(record, raw, record.get("labels"), mapping)
    own = record.get("categories")
    return made if own is None else replace(made, messages=_categorized(made.messages, own))


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


def _from_sharegpt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = [_spoken(item, i) for i, item in enumerate(_list(record, "conversations"))]
    labels, system = record.get("labels"), record.get("system")
    if system:
        raw = [{"role": "system", "content": system}, *raw]
        labels = [0, *labels] if isinstance(labels, list) else labels
    return _conversation(record, raw, labels, mapping)


def _from_prompt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    named = (mapping.prompt_key, mapping.response_key)
    others = PAIRS if named == _DEFAULT_PAIR else ()
    prompt_key, response_key = next((p for p in (named, *others) if _has(record, p)), named)
    keys = (prompt_key, mapping.query_key)
    raw = [*_system(record, mapping.system_key), *_exchange(record, keys, response_key)]
    return _conversation(record, raw, None, mapping)


def _from_alpaca(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = _system(record, mapping.system_key or "system")
    history = record.get("history") or []
    for number, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRecordError(
                "wrong type", f"`history` must be a list of [prompt, answer]; turn {number} is not"
            )
        raw += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    raw += _exchange(record, ("instruction", mapping.query_key or "input"), "output")
    return _conversation(record, raw, None, mapping)


Adapter = Callable[[dict[str, Any], FieldMap], Conversation]

FORMATS: Final[dict[str, Adapter]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
}


def _conversation(
    record: dict[str, Any], raw: list[Any], labels: Any, mapping: FieldMap
) -> Conversation:
    messages = make_messages(raw, labels, train_on=mapping.train_on)
    if mapping.category_key:
        category = category_from_field(record, mapping.category_key)
    else:
        category = make_category(record.get("meta"))
    return Conversation(messages, category, _tools(record.get("tools")))


def _tools(tools: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(tools, str) and tools:  # tables hold them as text
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as error:
            raise BadRecordError("wrong type", f"`tools` is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError("wrong type", "`tools` must be a list of objects")
    return tuple(tools)


def _system(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(record, key)}] if record.get(key) else []


def _exchange(
    record: dict[str, Any], prompt_keys: tuple[str, str], response_key: str
) -> list[dict[str, Any]]:
    prompt_key, query_key = prompt_keys
    parts = [_text(record, prompt_key)]
    if query_key and record.get(query_key):
        parts.append(_text(record, query_key))
    return [
        {"role": "user", "content": "\n".join(parts)},
        {"role": "assistant", "content": _text(record, response_key)},
    ]


def _text(record: dict[str, Any], key: str) -> str:
    if record.get(key) is None:
        raise BadRecordError(
            "missing field", f"`{key}` is null" if key in record else f"no `{key}`"
        )
    if not isinstance(record[key], str):
        raise BadRecordError("wrong type", f"`{key}` must be a string, not {_kind(record[key])}")
    return str(record[key])


def _has(record: dict[str, Any], keys: Iterable[str]) -> bool:
    return all(record.get(key) is not None for key in keys)


def _shown(field: tuple[str, Any]) -> str:
    return f"`{field[0]}`" + (" (null)" if field[1] is None else "")


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return f"byte {fault.start} is not UTF-8 ({line[fault.start]:#x}); save the file as UTF-8"
    return str(error)


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
