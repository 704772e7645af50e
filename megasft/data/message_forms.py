r"""One message as any format writes it, made an object with a role and a content.

ShareGPT's ``from`` and ``value`` are read wherever ``role`` and ``content`` are, and every other
key of a message is kept: labels, tool calls and thinking mean the same in all formats. Tools are
called in three ways, and all become ``tool_calls``:

    {"role": "assistant", "tool_calls": [...]}
    {"role": "assistant", "function_call": {"name": ..., "arguments": ...}}     OpenAI's older one
    {"from": "function_call", "value": "{\"name\": ..., \"arguments\": ...}"}   ShareGPT's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from megasft.data import exact_json
from megasft.data.conversation import ROLES, BadRecordError

SPEAKERS: Final = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
"""What a message may call its speaker, and the role that is."""
_CALLERS: Final = ("function_call", "tool_call")
_KEYS: Final = {"role", "from", "content", "value", "function_call"}
_MEDIA: Final = {
    f"{medium}{many}{what}"
    for medium in ("image", "audio", "video")
    for many in ("", "s")
    for what in (
        "",
        *(f"_{noun}{s}" for noun in ("url", "path", "file", "data") for s in ("", "s")),
    )
}


def messages_of(items: list[Any]) -> list[Any]:
    """Return messages as objects with ``role`` and ``content``.

    Raises:
        BadRecordError: One is no object, its speaker is unknown, or it holds media.
    """
    return [
        item  # nearly all: a role, a text, and nothing else
        if type(item) is dict and len(item) == 2 and "content" in item and item.get("role") in ROLES
        else _message(item, i)
        for i, item in enumerate(items)
    ]


def refuse_media(fields: Mapping[str, Any], place: str) -> None:
    """Refuse a record or a message with images, audio or video.

    Raises:
        BadRecordError: It has some.
    """
    if fields.keys().isdisjoint(_MEDIA):
        return
    for key, value in fields.items():
        if value and key in _MEDIA:
            raise BadRecordError(
                "media", f"{place} holds `{key}`; only text can be trained: leave such records out"
            )


def decoded(value: Any, what: str) -> Any:
    """Return what a text says as JSON; anything else as it is.

    Raises:
        BadRecordError: The text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return exact_json.load_exactly(value)
    except ValueError as error:
        raise BadRecordError("wrong type", f"{what} is a text that is not JSON: {error}") from None


def decoded_list(value: Any, what: str) -> list[dict[str, Any]]:
    """Return a list of objects that may be JSON text, as a whole or each entry (`datasets`' Json).

    Raises:
        BadRecordError: It is something else.
    """
    value = decoded(value, what)
    items = [decoded(item, what) for item in value] if isinstance(value, list) else None
    if items is None or not all(isinstance(item, dict) for item in items):
        raise BadRecordError("wrong type", f"{what} must be a list of objects")
    return items


def _message(item: Any, index: int) -> dict[str, Any]:
    place = f"message {index}"
    item = decoded(item, place) if isinstance(item, str) and item.startswith("{") else item
    if not isinstance(item, dict):
        raise BadRecordError("wrong type", f"{place} is not an object")
    refuse_media(item, place)
    speaker = item["role"] if "role" in item else item.get("from")
    if not item.keys() & {"role", "from"}:
        raise BadRecordError("missing field", f"{place} has no `role` (or `from`)")
    content = item["content"] if "content" in item else item.get("value")
    rest = {key: value for key, value in item.items() if key not in _KEYS and value is not None}
    called: list[Any] = []
    if speaker in _CALLERS:
        called = [content]
        speaker, content = "assistant", ""
    elif item.get("function_call"):
        called = [item["function_call"]]
    if rest.get("tool_calls"):
        rest["tool_calls"] = decoded_list(rest["tool_calls"], f"`tool_calls` of {place}")
    if called:
        rest["tool_calls"] = [*rest.get("tool_calls", ()), *_calls(called, place)]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join((*SPEAKERS, *_CALLERS))
        raise BadRecordError("unknown role", f"{place} has role {speaker!r}; known are {known}")
    return {"role": SPEAKERS[speaker], "content": content, **rest}


def _calls(written: Iterable[Any], place: str) -> list[dict[str, Any]]:
    calls = []
    for item in written:
        value = decoded(item, f"the call in {place}")
        for call in value if isinstance(value, list) else [value]:
            name = call.get("name") if isinstance(call, dict) else None
            if not isinstance(name, str):
                raise BadRecordError(
                    "wrong type",
                    f'the call in {place} must be {{"name": ..., "arguments": ...}}, or its JSON',
                )
            arguments = call.get("arguments", call.get("parameters", {}))
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls
