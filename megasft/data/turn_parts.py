"""Which part of a turn is thinking and which part calls tools, so that either can be left out.

A turn thinks, then says its text, then calls tools. What is left of it stays one turn: without its
thinking it begins behind that, without its calls it ends before them, and then without a stop
token, since the calls would have come first. A turn of nothing else is not trained.
"""

from __future__ import annotations

import re
from typing import Final

from megasft.data.conversation import REASONING_KEYS, Message
from megasft.data.turn_bounds import CLOSES_THINKING, Span

_CLOSING: Final = re.compile(rf"\s*(?:{CLOSES_THINKING}|<\|end\|>)?\s*")
_INLINE: Final = re.compile(r"\s*<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)


def without_thinking(text: str, span: Span, message: Message) -> Span:
    """Return what is left of a turn without its thinking."""
    return span._replace(start=_behind_thinking(text, span, message))


def without_calls(text: str, span: Span, message: Message) -> Span:
    """Return what is left of a turn without its tool calls; it may be empty."""
    if not message.extra.get("tool_calls"):
        return span
    end = _behind_thinking(text, span, message)
    said = _INLINE.sub("", message.content or "", count=1).strip()
    found = text.find(said, end, span.end) if said else -1
    if found >= 0:
        end = found + len(said)
    return span._replace(end=end, stop=None)


def _behind_thinking(text: str, span: Span, message: Message) -> int:
    """Return where the thinking of a turn and its closing tag end; its start if it has none."""
    inline = _INLINE.match(message.content or "")
    given = next((message.extra[key] for key in REASONING_KEYS if message.extra.get(key)), None)
    thinking = given if isinstance(given, str) else inline[1] if inline else ""
    found = text.find(thinking.strip(), span.start, span.end) if thinking.strip() else -1
    if found < 0:
        return span.start
    closing = _CLOSING.match(text, found + len(thinking.strip()), span.end)
    assert closing is not None, "it matches nothing, too"
    return closing.end()
