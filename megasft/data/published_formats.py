r"""Messages of records as Firefly, BELLE and MOSS publish their conversations.

    firefly  {"conversation": [{"human": ..., "assistant": ...}, ...]}
    belle    {"instruction": "Human:Hi\nAssistant:Hello\nHuman:Bye\nAssistant:", "output": ...}
    moss     {"meta_instruction": ..., "chat": {"turn_1": {"Human": "<|Human|>: Hi<eoh>",
             "Inner Thoughts": ..., "Commands": ..., "MOSS": "<|MOSS|>: Hello<eom>"}, ...}}

Their own control words are taken off: the chat template of the tokenizer has its own.
"""

from __future__ import annotations

import re
from typing import Any, Final

from megasft.data.conversation import LABEL_KEYS, BadRecordError

_BELLE_SPEAKER: Final = re.compile(r"(?:\A|\n)\s*(Human|Assistant)\s*[:\uff1a]\s*")
_MOSS_WORDS: Final = re.compile(r"\A\s*<\|[A-Za-z ]+\|>:\s*|\s*<eo[a-z]>\s*\Z")
_MOSS_NOTHING: Final = ("", "None")
_MOSS_TOOLS: Final = ("Commands", "Tool Responses")


def firefly_messages(turns: list[Any]) -> list[Any]:
    """Return the messages of ``conversation``: pairs of human and assistant, or messages already.

    Raises:
        BadRecordError: An entry is neither.
    """
    messages: list[Any] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"human", "assistant"} & turn.keys():
            messages.append(turn)
            continue
        for key in ("human", "assistant"):
            if not isinstance(turn.get(key), str):
                raise BadRecordError("missing field", f"turn {number} has no text `{key}`")
        rest = {key: value for key, value in turn.items() if key not in ("human", "assistant")}
        messages += [
            {"role": "user", "content": turn["human"]},
            {"role": "assistant", "content": turn["assistant"], **rest},
        ]
    return messages


def belle_dialogue(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a dialogue written into ``instruction``; none if it is no dialogue."""
    text, answer = record.get("instruction"), record.get("output")
    if not isinstance(text, str) or not isinstance(answer, str) or record.get("input"):
        return []
    parts = _BELLE_SPEAKER.split(text)  # "Human:Hi\nAssistant:" -> "", Human, Hi, Assistant, ""
    before, speakers, texts = parts[0], parts[1::2], parts[2::2]
    alternate = [("Human", "Assistant")[i % 2] for i in range(len(speakers))]
    if before.strip() or not speakers or len(speakers) % 2 or speakers != alternate or texts[-1]:
        return []
    roles = ("user", "assistant")
    texts[-1] = answer
    return [{"role": roles[i % 2], "content": text.strip()} for i, text in enumerate(texts)]


def moss_messages(chat: Any) -> list[dict[str, Any]]:
    """Return the messages of ``chat``.

    Raises:
        BadRecordError: It is something else, or a turn uses MOSS's plugins.
    """
    if not isinstance(chat, dict) or not chat:
        raise BadRecordError("missing field", "no `chat` with turns")
    messages: list[dict[str, Any]] = []
    for name in sorted(chat, key=lambda name: (len(name), name)):  # turn_2 before turn_10
        turn = chat[name]
        if not isinstance(turn, dict):
            raise BadRecordError("wrong type", f"`{name}` of `chat` is not an object")
        if any(_moss_text(turn, key) not in _MOSS_NOTHING for key in _MOSS_TOOLS):
            raise BadRecordError(
                "not supported",
                f"`{name}` calls a plugin of MOSS; write such conversations as `messages` with "
                "`tool_calls`",
            )
        if "Human" not in turn or "MOSS" not in turn:
            raise BadRecordError("missing field", f"`{name}` of `chat` lacks `Human` or `MOSS`")
        thinking = _moss_text(turn, "Inner Thoughts")
        labels = {key: turn[key] for key in LABEL_KEYS if key in turn}
        if thinking not in _MOSS_NOTHING:
            labels["reasoning_content"] = thinking
        messages += [
            {"role": "user", "content": _moss_text(turn, "Human")},
            {"role": "assistant", "content": _moss_text(turn, "MOSS"), **labels},
        ]
    return messages


def _moss_text(turn: dict[str, Any], key: str) -> str:
    text = turn.get(key) or ""
    if not isinstance(text, str):
        raise BadRecordError("wrong type", f"`{key}` of `chat` must be a string")
    return _MOSS_WORDS.sub("", text).strip()
