"""What transformers says about a sample: its render, and where the prompt of each answer ends.

An independent witness of the masks: nothing of our own render is used. At inference a model is
given ``apply_chat_template(messages[:i], add_generation_prompt=True)`` and generates message ``i``.
So that prompt should be how the render of the whole conversation begins, none of its tokens may be
trained by the turn of message ``i``, and the first one behind it must be.

The prompt is compared in tokens: as many as it has in common with the sample. Where its last
tokens glue to the answer (a header that ends in a blank before a word) it is compared in text.
Templates that print a date are shown the one the build showed them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import numpy as np

from megasft.checks.data.subject import special_texts
from megasft.data.conversation import Conversation
from megasft.schema import Sample

_TODAY: Final = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_EMPTY_THINKING: Final = re.compile(r"\s*(?:<think>\s*)?</think>\n{0,2}")
"""What a template puts before an answer without thinking, or the rest of it where the prompt opens
the block; more blanks are the answer's own."""


class UncheckableError(Exception):
    """transformers cannot say anything about this conversation."""


@dataclass(frozen=True, slots=True)
class Transformers:
    """The Hugging Face tokenizer as a user calls it.

    Attributes:
        hf: The tokenizer.
        chat_template: Given template that replaces its own; empty for its own.
        date: What the template sees as today; None for the true date.
    """

    hf: Any
    chat_template: str = ""
    date: datetime | None = None

    def render(
        self, messages: list[dict[str, Any]], conversation: Conversation, *, asks: bool = False
    ) -> str:
        """Return the text of some messages; with the generation prompt if it ``asks``.

        Raises:
            UncheckableError: The template refuses them.
        """
        tools = [dict(tool) for tool in conversation.tools] if conversation.tools else None
        try:
            text = self.hf.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template(tools),
                tokenize=False,
                add_generation_prompt=asks,
                **conversation.template_kwargs,
            )
        except Exception as error:  # a template can raise anything, and transformers as much
            raise UncheckableError(f"the chat template says: {error}") from None
        return str(text)

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        template = self.chat_template or str(self.hf.get_chat_template(tools=tools))
        if (date := self.date) is None:
            return template
        return _TODAY.sub(lambda call: json.dumps(date.strftime(call[2])), template)

    def encode(self, text: str) -> list[int]:
        """Return token ids, without those a post-processor would add."""
        return list(self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.hf.backend_tokenizer.decode(ids, skip_special_tokens=False))


class Prompt(NamedTuple):
    """What is known about the prompt of one turn.

    Attributes:
        message: Index of the message in the conversation.
        answer: Text of the turn.
        stable: The prompt is how the whole render begins; the rest is only known if so.
        glued: Its last tokens are others than in the sample.
        trains_prompt: The turn starts before the prompt ends, or goes on behind its message.
        misses_start: Something of the answer stands between the prompt and the turn.
    """

    message: int
    answer: str
    stable: bool
    glued: bool = False
    trains_prompt: bool = False
    misses_start: bool = False


class Witness(NamedTuple):
    """One sample beside the conversation it was made from.

    Attributes:
        conversation: As it stands in the source file.
        render: What transformers makes of it.
        same_tokens: The sample is that render, in tokens, or its beginning.
        spells_special: The conversation holds the text of a special token.
        num_foreign: Control tokens in the sample that only the authors' texts explain.
        prompts: One for each turn; none where tokens differ or everything is trained.
    """

    conversation: Conversation
    render: str
    same_tokens: bool
    spells_special: bool
    num_foreign: int
    prompts: tuple[Prompt, ...]


def witness(transformers: Transformers, conversation: Conversation, sample: Sample) -> Witness:
    """Ask transformers about a sample.

    Raises:
        UncheckableError: The template refuses the conversation there.
    """
    messages = [message.as_dict(message.content) for message in conversation.messages]
    render = transformers.render(messages, conversation)
    ids, tokens = transformers.encode(render), sample.tokens.tolist()
    special = special_texts(transformers.hf)
    pattern = re.compile(
        "|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))) or "(?!)"
    )
    texts = json.dumps([messages, conversation.tools], ensure_ascii=False)
    spells = pattern.search(texts) is not None
    same = ids[: len(tokens)] == tokens
    foreign = 0
    if spells:
        bare = _map_texts(messages, lambda text: pattern.sub("", text))
        expected = transformers.encode(transformers.render(bare, conversation))
        control = np.array(list(special.values()))
        foreign = int(np.isin(tokens, control).sum()) - int(np.isin(expected, control).sum())
    prompts: tuple[Prompt, ...] = ()
    if same and not _is_whole(sample):
        prompts = tuple(
            _prompt(transformers, conversation, render, tokens, turn)
            for turn in sample.turns.tolist()
        )
    return Witness(conversation, render, same, spells, max(foreign, 0), prompts)


def _prompt(
    transformers: Transformers,
    conversation: Conversation,
    render: str,
    tokens: list[int],
    turn: list[int],
) -> Prompt:
    start, num_tokens, _, index, _ = turn
    answer = transformers.decode(tokens[start : start + num_tokens])
    messages = [message.as_dict(message.content) for message in conversation.messages]
    if index == 0 or index >= len(messages) or messages[index]["role"] != "assistant":
        return Prompt(index, answer, stable=True)  # transformers renders no empty conversation
    prompt = transformers.render(messages[:index], conversation, asks=True)
    if not render.startswith(prompt):
        return Prompt(index, answer, stable=False)
    ids = transformers.encode(prompt)
    known = _common(ids, tokens)
    if is_glued := known < len(ids):
        is_early = len(transformers.decode(tokens[:start])) < len(prompt)
        is_late = len(transformers.decode(tokens[: start - 1])) >= len(prompt)
    else:
        is_early, is_late = start < known, start > known
    if is_late and (block := _EMPTY_THINKING.match(render, len(prompt))):
        # The token before the turn may begin in the block and end in the answer.
        is_late = len(transformers.decode(tokens[: start - 1])) >= block.end()
    is_long = _passes(transformers, conversation, render, tokens, (index, start + num_tokens))
    return Prompt(index, answer, True, is_glued, is_early or is_long, is_late)


def _passes(
    transformers: Transformers,
    conversation: Conversation,
    render: str,
    tokens: list[int],
    end: tuple[int, int],
) -> bool:
    """Say whether a turn that ends at a token goes on behind its message."""
    index, last = end
    messages = [m.as_dict(m.content) for m in conversation.messages[: index + 1]]
    if len(messages) == len(conversation.messages):
        return False
    until = transformers.render(messages, conversation)
    if not render.startswith(until) or last <= _common(transformers.encode(until), tokens):
        return False
    # The token right behind a message may begin in it; so the next role token ends some turns.
    return len(transformers.decode(tokens[: last - 1])) > len(until)


def _common(left: list[int], right: list[int]) -> int:
    size = min(len(left), len(right))
    different = np.flatnonzero(np.array(left[:size]) != np.array(right[:size]))
    return int(different[0]) if len(different) else size


def _is_whole(sample: Sample) -> bool:
    return bool(sample.turns[:, :2].tolist() == [[1, len(sample.tokens) - 1]])


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value
