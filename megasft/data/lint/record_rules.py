"""Rules that compare samples with the conversations they were made from; the witness's questions.

They see a sample of the samples, and only where the source files still are what they were.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from megasft.data.conversation import REASONING_KEYS, Message
from megasft.data.lint.witness import Prompt, Witness

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


def tools_not_declared(seen: Witness) -> int:
    """Count samples that call tools the prompt does not declare."""
    calls = any(_functions(message) for message in seen.conversation.messages)
    return int(calls and not seen.conversation.tools)


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
