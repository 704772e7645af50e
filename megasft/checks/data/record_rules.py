"""Rules that compare samples with the conversations they were made from; the witness's questions.

They see a sample of the samples, and only where the source files still are what they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from megasft.checks.data.witness import Prompt, Witness
from megasft.data.conversation import REASONING_KEYS, Message

_THINKING: Final = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.S)


def render_differs(seen: Witness) -> int:
    """Count samples whose tokens are not those of transformers' render."""
    return int(not seen.same_tokens and not seen.spells_special)


def prefix_unstable(seen: Witness) -> int:
    """Count turns whose prompt is not how the whole render begins."""
    return sum(not prompt.stable for prompt in seen.prompts)


def prompt_trained(seen: Witness) -> int:
    """Count turns that reach into the prompt, or behind their message."""
    return sum(prompt.trains_prompt for prompt in seen.prompts)


def answer_start_untrained(seen: Witness) -> int:
    """Count turns that leave out the first token of what the model has to generate."""
    return sum(prompt.misses_start for prompt in seen.prompts)


def glued_prompt(seen: Witness) -> int:
    """Count turns whose prompt ends in other tokens at inference."""
    return sum(prompt.glued for prompt in seen.prompts)


def not_assistant(seen: Witness) -> int:
    """Count turns that train a message of someone else."""
    return sum(
        prompt.message >= len(seen.conversation.messages)
        or _message(seen, prompt).role != "assistant"
        for prompt in seen.prompts
    )


def special_token_in_text(seen: Witness) -> int:
    """Count samples in which an author's text became a control token."""
    return int(seen.num_foreign > 0)


def thinking_lost(seen: Witness) -> int:
    """Count answers to train whose thinking the template leaves out."""
    trained = (message for message in seen.conversation.messages if message.trained)
    return sum(bool(t := _thinking(message)) and t not in seen.render for message in trained)


def tool_calls(seen: Witness) -> int:
    """Count turns in which a tool call of their message is not trained."""
    num = 0
    for prompt in seen.prompts:
        names = (str(f.get("name", "")) for f in _functions(_message(seen, prompt)))
        num += any(name not in prompt.answer for name in names)
    return num


def tool_arguments_twice(seen: Witness) -> int:
    """Count samples whose tool arguments are JSON in a JSON string once rendered."""
    arguments = [
        f.get("arguments") for message in seen.conversation.messages for f in _functions(message)
    ]
    return int(
        any(
            isinstance(a, str) and '"' in a and json.dumps(a, ensure_ascii=False) in seen.render
            for a in arguments
        )
    )


def tool_arguments_untrained(seen: Witness) -> int:
    """Count turns that leave out an argument of a tool call of their message."""
    num = 0
    for prompt in seen.prompts:
        texts = [t for f in _functions(_message(seen, prompt)) for t in _texts(f.get("arguments"))]
        num += any(not _is_in(text, prompt.answer) for text in texts)
    return num


def nulls_padded(seen: Witness) -> int:
    """Count samples whose tools or arguments hold nulls that a table put there."""
    declared: dict[str, Any] = {}
    for tool in seen.conversation.tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        if _has_null_property(parameters):
            return 1
        if isinstance(parameters, Mapping):
            declared[str(function.get("name"))] = parameters.get("properties") or {}
    for message in seen.conversation.messages:
        for function in _functions(message):
            arguments = function.get("arguments")
            given = arguments.items() if isinstance(arguments, Mapping) else ()
            known = declared.get(str(function.get("name")), {})
            if any(value is None and key not in known for key, value in given):
                return 1
    return 0


def tools_not_declared(seen: Witness) -> int:
    """Count samples that call tools the prompt does not declare."""
    calls = any(_functions(message) for message in seen.conversation.messages)
    return int(calls and not seen.conversation.tools)


def _has_null_property(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_has_null_property, schema))
    if not isinstance(schema, Mapping):
        return False
    properties = schema.get("properties")
    has_null = isinstance(properties, Mapping) and None in properties.values()
    return has_null or any(map(_has_null_property, schema.values()))


def _texts(arguments: Any) -> list[str]:
    """Return the texts among arguments, those of their JSON where they are a text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return [arguments]
    if isinstance(arguments, Mapping):
        return [text for value in arguments.values() for text in _texts_in(value)]
    return []


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts_in(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts_in(item)]
    return [value] if isinstance(value, str) else []


def _is_in(text: str, answer: str) -> bool:
    return text in answer or json.dumps(text, ensure_ascii=False)[1:-1] in answer


def _message(seen: Witness, prompt: Prompt) -> Message:
    messages = seen.conversation.messages
    return messages[min(prompt.message, len(messages) - 1)]


def _thinking(message: Message) -> str:
    for key in REASONING_KEYS:
        if message.extra.get(key):
            return str(message.extra[key]).strip()
    found = _THINKING.search(message.content or "")
    return found[1].strip() if found else ""


def _functions(message: Message) -> list[dict[str, Any]]:
    calls = message.extra.get("tool_calls")
    found = [c.get("function", c) for c in calls or [] if isinstance(c, dict)]
    return [function for function in found if isinstance(function, dict)]
