"""The tool calls of a message: their names, and their arguments in the form a chat template takes.

Some templates take arguments as an object (they go through its entries, or write it as JSON),
others as JSON text (they write it as it is), many take both. What a template takes is asked of the
template, once: it renders the first conversation that calls tools with either form in the place of
the arguments. A form that is refused, printed as Python writes a dict, made JSON in JSON or put in
braces again is not taken. Arguments in the other form are converted; where both are taken, an
author's stay as written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from megasft.data import exact_json
from megasft.data.chat_template import CLOSE, ChatTemplate
from megasft.data.conversation import BadRecordError, Conversation, Message

_KEY, _VALUE = "Qz7key0vK", "Qz7value0vK"
_PROBE: Final = {_KEY: _VALUE}
_PROBE_TEXT: Final = json.dumps(_PROBE)


class Call(NamedTuple):
    """One call: name, id and arguments as they are written; empty where there are none."""

    name: str
    id: str
    arguments: Any

    def is_in(self, text: str) -> bool:
        """Say whether a text holds the name, or the id in its place, and all arguments."""
        is_named = self.name in text or self.is_named_by_id(text)
        arguments = self.arguments
        if isinstance(arguments, str):
            try:
                arguments = exact_json.load_exactly(arguments)
            except ValueError:
                return is_named and arguments in text
        return is_named and all(_is_in(value, text) for value in _leaves(arguments))

    def is_named_by_id(self, text: str) -> bool:
        """Say whether a text names the function by the id of the call (Kimi's)."""
        return bool(self.name) and self.name in self.id and self.id in text


def calls_of(message: Message) -> Iterator[Call]:
    """Yield the calls of a message."""
    calls = message.extra.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            name, arguments = str(function.get("name", "")), function.get("arguments")
            yield Call(name, str(call.get("id") or ""), arguments)


def with_mark(messages: list[dict[str, Any]], index: int) -> list[dict[str, Any]] | None:
    """Return messages with one more argument in the last call of one; None if it cannot be."""
    calls = messages[index].get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return None

    def more(arguments: Any) -> Any:
        if isinstance(arguments, str):
            return arguments + CLOSE
        return {**arguments, CLOSE: 0} if isinstance(arguments, Mapping) else arguments

    marked = {**messages[index], "tool_calls": [*calls[:-1], _changed(calls[-1], more)]}
    return [*messages[:index], marked, *messages[index + 1 :]]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_in(value: Any, text: str) -> bool:
    written = json.dumps(value, ensure_ascii=False)
    forms = (value, written[1:-1]) if isinstance(value, str) else (written, str(value))
    return value is None or any(form in text for form in forms)


class ArgumentForm:
    """Converts the arguments of calls to the form that one chat template takes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._takes: tuple[bool, bool] | None = None  # an object, a text

    def fit(self, conversation: Conversation) -> Conversation:
        """Return a conversation with arguments the template takes.

        Raises:
            BadRecordError: They would have to be an object, and are no JSON of one.
        """
        forms = {
            type(call.arguments)
            for message in conversation.messages
            if message.extra
            for call in calls_of(message)
        }
        if not forms & {str, dict}:
            return conversation
        if self._takes is None:
            self._takes = self._asked(conversation)
        takes_object, takes_text = self._takes or (True, True)
        if takes_object and not takes_text and str in forms:
            return _converted(conversation, _as_object)
        if takes_text and not takes_object and dict in forms:
            return _converted(conversation, _as_text)
        return conversation

    def _asked(self, conversation: Conversation) -> tuple[bool, bool] | None:
        """Return which forms are taken; None if neither is: it says nothing about them."""
        as_object = self._render(conversation, _PROBE)
        as_text = self._render(conversation, _PROBE_TEXT)
        takes_object = _KEY in as_object and _VALUE in as_object and f"'{_KEY}'" not in as_object
        takes_text = _PROBE_TEXT in as_text and f"{{{_PROBE_TEXT}" not in as_text
        return (takes_object, takes_text) if takes_object or takes_text else None

    def _render(self, conversation: Conversation, arguments: Any) -> str:
        probe = _converted(conversation, lambda _, place: arguments)
        messages = [message.as_dict(message.content) for message in probe.messages]
        try:
            return self._template.run(messages, probe.tools)
        except BadRecordError:
            return ""


def _converted(conversation: Conversation, convert: Callable[[Any, str], Any]) -> Conversation:
    messages = (_message(m, i, convert) for i, m in enumerate(conversation.messages))
    return conversation._replace(messages=tuple(messages))


def _message(message: Message, index: int, convert: Callable[[Any, str], Any]) -> Message:
    calls = message.extra.get("tool_calls") if message.extra else None
    if not isinstance(calls, list):
        return message
    changed = [_changed(call, lambda a: convert(a, f"message {index}")) for call in calls]
    return message._replace(extra={**message.extra, "tool_calls": changed})


def _changed(call: Any, convert: Callable[[Any], Any]) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    changed = {**function, "arguments": convert(function["arguments"])}
    return {**call, "function": changed} if "function" in call else changed


def _as_object(arguments: Any, place: str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = exact_json.load_exactly(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise BadRecordError(
            "wrong type",
            f"the chat template takes the arguments of a call as an object, and those of {place} "
            f"are a text that is not JSON: {error}",
        ) from None
    if not isinstance(value, dict):
        raise BadRecordError("wrong type", f"the arguments of a call in {place} are no object")
    return value


def _as_text(arguments: Any, place: str) -> Any:
    is_object = isinstance(arguments, Mapping)
    return json.dumps(arguments, ensure_ascii=False) if is_object else arguments
