"""From a record as people store it to a conversation: one adapter a format.

    messages   {"messages": [{"role": "user", "content": ...}, ...], "labels": [...],
                "categories": [...]}; labels and categories, where given, have one entry a message
    sharegpt   {"conversations": [{"from": "human", "value": ...}]}
    prompt     {"prompt": ..., "response": ...}, texts or (TRL) lists of messages; --prompt-key,
               --response-key, and, where wanted, --query-key name other fields
    alpaca     {"instruction": ..., "input": ..., "output": ..., "history": [[q, a]]}
    firefly    {"input": ..., "target": ...} or {"conversation": [{"human", "assistant"}, ...]}
    moss       {"chat": {"turn_1": {"Human": ..., "MOSS": ...}, ...}}
    text       {"text": ...}: pretraining text, one turn, ended by the eos

The format is found record by record from the fields it has, so one file may mix them; ``--format``
insists on one. Named fields come before the well-known ones. Formats that used to bring their own
template (``Q: ... A: ...``, Alpaca's "Below is an instruction") lose it: the chat template of the
tokenizer is what the model is asked with later. An earlier turn of ``history`` is trained as any
other. Messages are alike in all formats (``message_forms.py``), and so is what stands beside them
(``record_fields.py``): a system message, tools, categories, arguments of the template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from megasft.data import exact_json
from megasft.data.conversation import (
    LABEL_KEYS,
    MAX_RECORD_BYTES,
    BadRecordError,
    Conversation,
)
from megasft.data.message_forms import decoded, messages_of, refuse_media
from megasft.data.published_formats import belle_dialogue, firefly_messages, moss_messages
from megasft.data.record_fields import FieldMap, conversation_of

__all__ = ["FORMATS", "FieldMap", "parse"]

PAIRS: Final = (
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("question", "answer"),
)
"""Fields of prompt and response that are known without being named."""
_DEFAULT_PAIR: Final = PAIRS[0]


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
        conversation = _parsed(exact_json.load(line), mapping)
        if not conversation.has_fields:
            return conversation
        if exact_json.has_long_number(line):  # one of the fields may have lost digits
            conversation = _parsed(exact_json.load_exactly(line), mapping)
    except ValueError as error:
        raise BadRecordError("not JSON", _why_not_json(line, error)) from None
    if b"NaN" in line or b"Infinity" in line:
        _refuse_constants(conversation)
    return conversation


def _parsed(record: Any, mapping: FieldMap) -> Conversation:
    if not isinstance(record, dict):
        raise BadRecordError("not an object", f"a record is an object, this is {_kind(record)}")
    refuse_media(record, "the record")
    return FORMATS[_format_of(record, mapping)](record, mapping)


def _refuse_constants(conversation: Conversation) -> None:
    extras = [message.extra for message in conversation.messages]
    fields = [*map(dict, extras), conversation.tools, dict(conversation.template_kwargs)]
    if exact_json.holds_constant(fields):
        raise BadRecordError(
            "not JSON", "a message or tool holds NaN or Infinity, which JSON has no word for"
        )


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
    if isinstance(record.get("conversation"), list) or _has(record, ("input", "target")):
        return "firefly"
    if isinstance(record.get("chat"), dict):
        return "moss"
    if "instruction" in record and _has(record, ("output",)):
        return "alpaca"
    if _has(record, named) or any(_has(record, pair) for pair in PAIRS):
        return "prompt"
    if record.get("text") is not None:
        return "text"
    raise BadRecordError(
        "missing field",
        f"no `messages`, `conversations`, `conversation`, `chat` or `text`, no `instruction` with "
        f"`output`, no `input` with `target`, and not both of `{mapping.prompt_key}` and "
        f"`{mapping.response_key}` (--prompt-key, --response-key); "
        f"it has {', '.join(map(_shown, list(record.items())[:8])) or 'no field'}",
    )


def _from_messages(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    return _from_list(record, mapping, "messages")


def _from_sharegpt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    return _from_list(record, mapping, "conversations")


def _from_list(record: dict[str, Any], mapping: FieldMap, key: str) -> Conversation:
    return conversation_of(
        record,
        _list(record, key),
        mapping,
        read=(key, "labels", "categories"),
        labels=record.get("labels"),
        categories=record.get("categories"),
    )


def _from_prompt(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    named = (mapping.prompt_key, mapping.response_key)
    others = PAIRS if named == _DEFAULT_PAIR else ()
    prompt_key, response_key = next((p for p in (named, *others) if _has(record, p)), named)
    keys = (prompt_key, mapping.query_key)
    raw = _exchange(record, keys, response_key)
    return conversation_of(record, raw, mapping, read=(*keys, response_key))


def _from_alpaca(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw: list[Any] = []
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
    keys = ("instruction", mapping.query_key or "input")
    raw += belle_dialogue(record) or _exchange(record, keys, "output")
    return conversation_of(record, raw, mapping, read=(*keys, "output", "history"))


def _from_firefly(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    if record.get("conversation") is not None:
        raw = firefly_messages(_list(record, "conversation"))
        return conversation_of(record, raw, mapping, read=("conversation",))
    raw = _exchange(record, ("input", ""), "target")
    return conversation_of(record, raw, mapping, read=("input", "target"))


def _from_moss(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = moss_messages(record.get("chat"))
    return conversation_of(record, raw, mapping, read=("chat", "num_turns"))


def _from_text(record: dict[str, Any], mapping: FieldMap) -> Conversation:
    raw = [{"role": "assistant", "content": _text(record, "text")}]
    made = conversation_of(record, raw, mapping, read=("text",))
    return made._replace(is_text=True)


Adapter = Callable[[dict[str, Any], FieldMap], Conversation]

FORMATS: Final[dict[str, Adapter]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
    "firefly": _from_firefly,
    "moss": _from_moss,
    "text": _from_text,
}


def _exchange(
    record: dict[str, Any], prompt_keys: tuple[str, str], response_key: str
) -> list[dict[str, Any]]:
    """Return the messages of a prompt and its answer; either may be a list of messages already."""
    prompt_key, query_key = prompt_keys
    asked, answer = record.get(prompt_key), record.get(response_key)
    if isinstance(asked, list) and asked:
        asked = [_unlabelled(message) for message in messages_of(asked)]
    else:
        query = _text(record, query_key) if query_key and record.get(query_key) else ""
        parts = [] if query and not asked else [_text(record, prompt_key)]
        asked = [{"role": "user", "content": "\n".join([*parts, query] if query else parts)}]
    if isinstance(answer, list) and answer:
        return [*asked, *answer]
    return [*asked, {"role": "assistant", "content": _text(record, response_key)}]


def _unlabelled(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a prompt, which is not trained unless it says so itself."""
    has_label = message["role"] != "assistant" or any(key in message for key in LABEL_KEYS)
    return message if has_label else {**message, "label": 0}


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


def _why_not_json(line: bytes, error: ValueError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return f"byte {fault.start} is not UTF-8 ({line[fault.start]:#x}); save the file as UTF-8"
    return str(error)


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if key not in record:
        raise BadRecordError("missing field", f"no `{key}`")
    value = decoded(record[key], f"`{key}`")
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f"`{key}` must be a list, not {_kind(value)}")
    if not value:
        raise BadRecordError("no assistant turn", f"`{key}` is empty")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value))
