"""The shape of a conversation: everything a chat template sees but the words.

A shape holds the roles, which messages are trained, the blanks around each text, the tags of a
``<think>`` block, the tools and every field but the texts. The texts, stripped of white space, are
its *leaves*, in order. Conversations of one shape are rendered alike up to their leaves, as long as
the template does not look into those (``chat_template.LookedFor``), so a build meets few shapes
and learns each once (``skeleton.py``).

    a user's "  Hi"                      shape: user, two blanks      leaf: "Hi"
    an assistant's "<think>a</think>b"   shape: assistant, both tags  leaves: "a", "b"

Names of called tools are leaves too: they show where a call lies in the render. Arguments of calls
and schemas of tools belong to the shape, so conversations that call tools have shapes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from megasft.data import exact_json
from megasft.data.conversation import REASONING_KEYS, Conversation, Message

_THINKING: Final = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]+", re.ASCII)
_DIGEST_BYTES: Final = 64  # schemas are long, and shapes are remembered
_BARE: Final = {
    (role, trained): (role, trained)
    for role in ("system", "user", "assistant", "tool")
    for trained in (False, True)
}


class Leaf(NamedTuple):
    """A text whose words do not belong to the shape.

    Attributes:
        message: Index of its message.
        kind: ``TEXT``, ``REASONING`` or ``TOOL_NAME``.
    """

    message: int
    kind: str


TEXT, REASONING, TOOL_NAME = "text", "reasoning", "tool name"
Shape = tuple[object, ...]


def shape_of(conversation: Conversation) -> tuple[Shape, list[str]]:
    """Return the shape of a conversation and its leaves."""
    leaves: list[str] = []
    shape: list[object] = []
    for message in conversation.messages:
        role, content, trained, extra, _, _, _ = message
        # Most messages: no blanks, no thinking, nothing but a text.
        if content and not extra and (role != "assistant" or "</think>" not in content):
            body = content.strip()
            if len(body) == len(content):
                leaves.append(body)
                shape.append(_BARE[role, trained])
                continue
        shape.append(_message_shape(message, leaves))
    if conversation.tools:
        shape.append(_digest(exact_json.dump(conversation.tools)))
    return tuple(shape), leaves


def probe(conversation: Conversation, name: Callable[[int, str], str]) -> Probe:
    """Return what a template is given to learn a shape: names in the place of the leaves.

    Args:
        conversation: Any of the shape.
        name: The name of a leaf, by its number and kind.
    """
    leaves: list[Leaf] = []
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(conversation.messages):

        def put(text: str, kind: str, index: int = index) -> str:
            leaves.append(Leaf(index, kind))
            return name(len(leaves) - 1, kind)

        messages.append(_rewritten(message, put))
    return Probe(messages, leaves)


class Probe(NamedTuple):
    """Messages with names in the place of leaves, and the leaves in their order."""

    messages: list[dict[str, Any]]
    leaves: list[Leaf]


Put = Callable[[str, str], str]


def _message_shape(message: Message, leaves: list[str]) -> Shape:
    def put(text: str, kind: str) -> str:
        leaves.append(text)
        return "\0"  # a text may hold it too: then a sampled check finds the template unfaithful

    rewritten = _rewritten(message, put)
    return (message.role, message.trained, _digest(exact_json.dump(rewritten)))


def _digest(data: bytes) -> bytes:
    return data if len(data) <= _DIGEST_BYTES else blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _rewritten(message: Message, put: Put) -> dict[str, Any]:
    content = message.content
    fields: dict[str, Any] = {"role": message.role, "content": content}
    if content is not None:
        rewrite = _thinking if message.role == "assistant" else _text
        fields["content"] = rewrite(content, put)
    for key, value in message.extra.items():
        if key in REASONING_KEYS and isinstance(value, str):
            fields[key] = _text(value, put, kind=REASONING)
        elif key == "tool_calls" and isinstance(value, list):
            fields[key] = [_call(item, put) for item in value]
        else:
            fields[key] = value
    return fields


def _text(text: str, put: Put, kind: str = TEXT) -> str:
    lead, body, tail = split_blanks(text)
    return f"{lead}{put(body, kind)}{tail}" if body else text


def _thinking(content: str, put: Put) -> str:
    lead, body, tail = split_blanks(content)
    found = _THINKING.fullmatch(body)
    if found is None:
        return _text(content, put)
    opening, reasoning, closing, answer = found.groups()
    reasoning = put(reasoning, REASONING) if reasoning else ""
    answer = put(answer, TEXT) if answer else ""
    return f"{lead}{opening}{reasoning}{closing}{answer}{tail}"


def _call(call: Any, put: Put) -> Any:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        return call
    renamed = {**function, "name": put(name, TOOL_NAME)}
    return {**call, "function": renamed} if "function" in call else renamed


def split_blanks(text: str) -> tuple[str, str, str]:
    """Return the white space before, the body, and the white space behind; without body, behind.

    Example:
        >>> split_blanks("  a b ")
        ('  ', 'a b', ' ')
    """
    body = text.strip()
    start = text.index(body[0]) if body else 0
    return text[:start], body, text[start + len(body) :]


def extra_texts(conversation: Conversation) -> list[str]:
    """Return the strings that are no leaves: schemas, arguments, names and other fields."""
    texts: list[str] = []
    waiting: list[Any] = [conversation.tools]
    for message in conversation.messages:
        for key, value in message.extra.items():
            if not (key in REASONING_KEYS and isinstance(value, str)):
                waiting.append(value)
    while waiting:  # of parsed JSON, so these types and no others
        value = waiting.pop()
        kind = type(value)
        if kind is str:
            texts.append(value)
        elif kind is dict:
            texts += value
            waiting += value.values()
        elif kind is list or kind is tuple:
            waiting += value
    return texts
