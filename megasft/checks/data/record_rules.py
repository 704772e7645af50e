"""Rules that compare samples with the conversations they were made from; the witness's questions.

They see a sample of the samples, and only where the source files still are what they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from megasft.checks.data.subject import Needs
from megasft.checks.data.witness import Prompt, Witness
from megasft.checks.engine import Severity, rule
from megasft.data.conversation import REASONING_KEYS, Message

_THINKING: Final = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.S)


@rule("prompt-trained", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def prompt_trained(seen: Witness) -> int:
    """Tokens of the prompt, or of what follows the message, are trained as if they were answer.

    Remedy: build the store again; if it stays, report the chat template
    """
    return sum(prompt.trains_prompt for prompt in seen.prompts)


@rule("answer-start-untrained", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def answer_start_untrained(seen: Witness) -> int:
    """The first token the model has to generate after its prompt is not trained.

    Remedy: build the store again; if it stays, report the chat template
    """
    return sum(prompt.misses_start for prompt in seen.prompts)


@rule("not-assistant", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def not_assistant(seen: Witness) -> int:
    """The turn trains a message of the user, the system or a tool.

    Remedy: build the store again, with the same --format and --*-key flags given to lint
    """
    return sum(
        prompt.message >= len(seen.conversation.messages)
        or _message(seen, prompt).role != "assistant"
        for prompt in seen.prompts
    )


@rule("render-differs", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="samples")
def render_differs(seen: Witness) -> int:
    """The tokens are not those of transformers' apply_chat_template of the same conversation.

    Remedy: build the store again with this tokenizer; give lint the --*-key flags of the build
    """
    return int(not seen.same_tokens and not seen.spells_special)


@rule("special-token-in-text", Severity.ERROR, Needs.RECORD, unit="samples")
def special_token_in_text(seen: Witness) -> int:
    """A special token that an author wrote as text became a control token.

    Remedy: build with --special-tokens-in-text escape, or reject
    """
    return int(seen.num_foreign > 0)


@rule("tool-calls", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def tool_calls(seen: Witness) -> int:
    """A tool call of a trained message is not in what is trained.

    Remedy: use a chat template that renders tool_calls (--chat-template FILE)
    """
    num = 0
    for prompt in seen.prompts:
        names = (str(f.get("name", "")) for f in _functions(_message(seen, prompt)))
        num += any(name not in prompt.answer for name in names)
    return num


@rule("tool-arguments-untrained", Severity.ERROR, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def tool_arguments_untrained(seen: Witness) -> int:
    """An argument of a tool call of a trained message is not in what is trained.

    Remedy: build the store again; if it stays, report the chat template
    """
    num = 0
    for prompt in seen.prompts:
        texts = [t for f in _functions(_message(seen, prompt)) for t in _texts(f.get("arguments"))]
        num += any(not _is_in(text, prompt.answer) for text in texts)
    return num


@rule("prefix-unstable", Severity.WARNING, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def prefix_unstable(seen: Witness) -> int:
    """The prompt at inference (messages before the answer, with generation prompt) is not how the
    whole render begins: the answer is trained behind a prompt the model never gets.

    Remedy: see which part differs with `megasft trace --sample`; train such records with --train-on
    last-turn, or use a template that renders history as it was generated
    """  # noqa: D205
    return sum(not prompt.stable for prompt in seen.prompts)


@rule("glued-prompt", Severity.WARNING, Needs.RECORD, Needs.SAME_TOKENS, unit="turns")
def glued_prompt(seen: Witness) -> int:
    """The last tokens of the prompt glue to the answer: at inference they are other tokens.

    Remedy: end the template's assistant header with a special token or a line end, not a blank
    """
    return sum(prompt.glued for prompt in seen.prompts)


@rule("thinking-lost", Severity.WARNING, Needs.RECORD, unit="turns")
def thinking_lost(seen: Witness) -> int:
    """The message has thinking which the chat template leaves out of the render.

    Remedy: cut the conversation behind that answer, so that it is the last turn; or choose with
    --stripped-thinking mask, train or reject
    """
    trained = (message for message in seen.conversation.messages if message.trained)
    return sum(bool(t := _thinking(message)) and t not in seen.render for message in trained)


@rule("tool-arguments-twice", Severity.WARNING, Needs.RECORD, unit="samples")
def tool_arguments_twice(seen: Witness) -> int:
    """The arguments of a tool call are rendered as JSON inside a JSON string.

    Remedy: store `arguments` as an object, not as a string
    """
    arguments = [
        f.get("arguments") for message in seen.conversation.messages for f in _functions(message)
    ]
    return int(
        any(
            isinstance(a, str) and '"' in a and json.dumps(a, ensure_ascii=False) in seen.render
            for a in arguments
        )
    )


@rule("tools-not-declared", Severity.NOTE, Needs.RECORD, unit="samples")
def tools_not_declared(seen: Witness) -> int:
    """Tools are called which the conversation does not declare in `tools`.

    Remedy: add `tools`, so that the model sees what it may call
    """
    calls = any(_functions(message) for message in seen.conversation.messages)
    return int(calls and not seen.conversation.tools)


@rule("nulls-padded", Severity.WARNING, Needs.RECORD, unit="samples")
def nulls_padded(seen: Witness) -> int:
    """Tools or arguments hold nulls that a table put there: each has the fields of all others.

    Remedy: give the parquet or Arrow file itself to --input, where nulls are left out; or write the
    JSON from the records it was made of, not through a table
    """
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
