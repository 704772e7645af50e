"""Seven families of chat templates, and for each a plain-Python oracle of what a sample must be.

The templates, in ``chat_templates/``, behave like published ones. An oracle never sees them: it
writes the render down piece by piece, and says of each piece who wrote it and which turn trains it.
It shares no code with the engine, so the two can only agree by being right.

Rules of the oracles: a turn is what the model generates after its prompt, stop token, thinking and
tool calls included; an empty think block the template puts in is not; a turn whose thinking the
template drops is not trained, unless ``trains_stripped``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

Record = dict[str, Any]


class Piece(NamedTuple):
    """Some characters of a render.

    Attributes:
        text: The characters.
        turn: Index of the message that trains them; None if they are not trained.
        written: The record's author wrote them, not the template.
    """

    text: str
    turn: int | None
    written: bool


Oracle = Callable[[Record, bool], list[Piece]]
"""From a record and ``trains_stripped`` to the pieces of its render."""


@dataclass(frozen=True, slots=True)
class Family:
    """What one kind of model expects.

    Attributes:
        oracle: What its template renders, piece by piece.
        special: Tokens with ``special=True``.
        added: Tokens the vocabulary holds whole, but ``special=False``.
        bos: One of ``special``, or empty.
        eos: One of ``special``.
        has_tools: The template renders tools, tool calls and tool results.
        alternates: Users and assistants must take turns.
        thinks: The template looks for thinking.
    """

    oracle: Oracle
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str = ""
    eos: str = "<|im_end|>"
    has_tools: bool = True
    alternates: bool = False
    thinks: bool = False


def template_of(name: str) -> str:
    """Return the Jinja source of a family's chat template."""
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def content_of(message: Record) -> str:
    """Return the text of a message, given as text, as parts or not at all."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def is_trained(record: Record, index: int) -> bool:
    """Say if the record wants this message trained."""
    labels = record.get("labels")
    if record["messages"][index]["role"] != "assistant":
        return False
    return labels is None or labels[index] == 1


def _author(text: str, turn: int | None = None) -> Piece:
    return Piece(text, turn, written=True)


def _frame(text: str, turn: int | None = None) -> Piece:
    return Piece(text, turn, written=False)


def _json(value: Any, turn: int | None = None) -> Piece:
    return _author(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), turn)


def _json_text(text: str) -> Piece:
    return _author(json.dumps(text, ensure_ascii=False))


def _functions(message: Record) -> list[Record]:
    return [call["function"] for call in message.get("tool_calls") or []]


def _turn(record: Record, index: int) -> int | None:
    return index if is_trained(record, index) else None


def _enumerated(record: Record) -> Iterator[tuple[int, str, Record]]:
    for index, message in enumerate(record["messages"]):
        yield index, message["role"], message


# ChatML as Qwen2.5 has it: a system message is put in where there is none; tools stand behind it.


def _chatml(record: Record, trains_stripped: bool) -> list[Piece]:
    messages = record["messages"]
    leads = messages[0]["role"] == "system"
    out = [_frame("<|im_start|>system\n")]
    out.append(_author(content_of(messages[0])) if leads else _frame("You answer with care."))
    out += [*_chatml_tools(record, "\n\n"), _frame("<|im_end|>\n")]
    for index, role, message in _enumerated(record):
        if index == 0 and leads:
            continue
        if role == "tool":
            out += _chatml_result(messages, index)
            continue
        turn, text = _turn(record, index), content_of(message)
        out += [_frame(f"<|im_start|>{role}\n"), _author(text, turn)]
        out += _chatml_calls(_functions(message), turn, leading=bool(text))
        out += [_frame("<|im_end|>", turn), _frame("\n")]
    return out


def _chatml_tools(record: Record, gap: str) -> Iterator[Piece]:
    if record.get("tools"):
        yield _frame(f"{gap}# Tools\n\nCall one of these, inside <tool_call></tool_call>:\n<tools>")
        for tool in record["tools"]:
            yield from (_frame("\n"), _json(tool))
        yield _frame("\n</tools>")


def _chatml_calls(functions: list[Record], turn: int | None, *, leading: bool) -> Iterator[Piece]:
    for number, function in enumerate(functions):
        lead = "\n" if number or leading else ""
        yield _frame(f'{lead}<tool_call>\n{{"name": "', turn)
        yield _author(function["name"], turn)
        yield _frame('", "arguments": ', turn)
        yield _json(function["arguments"], turn)
        yield _frame("}\n</tool_call>", turn)


def _chatml_result(messages: list[Record], index: int) -> Iterator[Piece]:
    if index == 0 or messages[index - 1]["role"] != "tool":
        yield _frame("<|im_start|>user")
    yield _frame("\n<tool_response>\n")
    yield _author(content_of(messages[index]))
    yield _frame("\n</tool_response>")
    if index + 1 == len(messages) or messages[index + 1]["role"] != "tool":
        yield _frame("<|im_end|>\n")


# Qwen3: thinking before the last user's message is dropped; the last turn gets an empty block.


def split_thinking(message: Record) -> tuple[str, str]:
    """Return thinking and answer of an assistant's message, newlines around them gone."""
    content = content_of(message)
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip("\n"), content
    found = re.fullmatch(r"(?s)<think>(.*)</think>\n*(.*?)", content)
    return (found[1].strip("\n"), found[2]) if found else ("", content)


def _qwen3(record: Record, trains_stripped: bool) -> list[Piece]:
    messages = record["messages"]
    out: list[Piece] = []
    if record.get("tools") or messages[0]["role"] == "system":
        out = [_frame("<|im_start|>system\n")]
        if messages[0]["role"] == "system":
            out.append(_author(content_of(messages[0])))
        out += [*_chatml_tools(record, "\n\n"), _frame("<|im_end|>\n")]
    query = max((i for i, role, _ in _enumerated(record) if role == "user"), default=-1)
    for index, role, message in _enumerated(record):
        if role == "tool":
            out += _chatml_result(messages, index)
        elif role == "assistant":
            thinking, body = split_thinking(message)
            turn = _turn(record, index)
            if thinking and index < query and not trains_stripped:
                turn = None
            out.append(_frame("<|im_start|>assistant\n"))
            if index > query and thinking:
                out.append(_frame("<think>\n", turn))
                out.append(_author(thinking, turn))
                out.append(_frame("\n</think>\n\n", turn))
            elif index > query and index + 1 == len(messages):
                out.append(_frame("<think>\n\n</think>\n\n"))
            shows = index > query and (thinking or index + 1 == len(messages))
            out.append(_author(body.lstrip("\n") if shows else body, turn))
            out += _chatml_calls(_functions(message), turn, leading=bool(body))
            out += [_frame("<|im_end|>", turn), _frame("\n")]
        elif index or role != "system":
            out += [_frame(f"<|im_start|>{role}\n"), _author(content_of(message))]
            out.append(_frame("<|im_end|>\n"))
    return out


# Llama 3: a system block always, texts are trimmed, one tool call a message, results by `ipython`.


def _llama3(record: Record, trains_stripped: bool) -> list[Piece]:
    def head(role: str) -> Piece:
        return _frame(f"<|start_header_id|>{role}<|end_header_id|>\n\n")

    leads = record["messages"][0]["role"] == "system"
    out = [_frame("<|begin_of_text|>"), head("system"), _frame("Today Date: 26 Jul 2024\n\n")]
    out += [_author(content_of(record["messages"][0]).strip())] if leads else []
    for tool in record.get("tools") or []:
        out += [_frame("\n\n"), _author(json.dumps(tool, ensure_ascii=False, indent=4))]
    out.append(_frame("<|eot_id|>"))
    for index, role, message in _enumerated(record):
        turn, functions = _turn(record, index), _functions(message)
        if index == 0 and leads:
            continue
        if role == "tool":
            out += [head("ipython"), _json_text(content_of(message))]
        elif functions:
            out += [head(role), _frame('{"name": "', turn), _author(functions[0]["name"], turn)]
            out += [_frame('", "parameters": ', turn), _json(functions[0]["arguments"], turn)]
            out.append(_frame("}", turn))
        else:
            out += [head(role), _author(content_of(message).strip(), turn)]
        out.append(_frame("<|eot_id|>", turn))
    return out


# Gemma: no system role, its text leads the first user's; the assistant is called model; trimmed.


def _gemma(record: Record, trains_stripped: bool) -> list[Piece]:
    out, system = [_frame("<bos>")], []
    for index, role, message in _enumerated(record):
        if role == "system":
            system = [_author(content_of(message)), _frame("\n\n")]
            continue
        turn, name = _turn(record, index), "model" if role == "assistant" else role
        out += [_frame(f"<start_of_turn>{name}\n"), *system]
        out += [_author(content_of(message).strip(), turn), _frame("<end_of_turn>", turn)]
        out.append(_frame("\n"))
        system = []
    return out


# Mistral: nothing but [/INST] is the header, so the blank before an answer is the model's.


def _mistral(record: Record, trains_stripped: bool) -> list[Piece]:
    out, system = [_frame("<s>")], []
    last = max(i for i, role, _ in _enumerated(record) if role == "user")
    for index, role, message in _enumerated(record):
        turn, text = _turn(record, index), content_of(message)
        if role == "system":
            system = [_author(text), _frame("\n\n")]
        elif role == "user":
            if index == last and record.get("tools"):
                out += [_frame("[AVAILABLE_TOOLS] "), _json(record["tools"])]
                out.append(_frame("[/AVAILABLE_TOOLS]"))
            out += [_frame("[INST] "), *system, _author(text), _frame("[/INST]")]
            system = []
        elif role == "tool":
            out += [_frame('[TOOL_RESULTS] {"content": '), _json_text(text)]
            out.append(_frame("}[/TOOL_RESULTS]"))
        elif functions := _functions(message):
            out += [_frame("[TOOL_CALLS] ", turn), _json(functions, turn), _frame("</s>", turn)]
        else:
            out += [_frame(" ", turn), _author(text, turn), _frame("</s>", turn)]
    return out


# DeepSeek: only begin and end are special tokens; thinking is dropped but behind a tool's output.


def _deepseek(record: Record, trains_stripped: bool) -> list[Piece]:
    out, previous = [_frame("<｜begin▁of▁sentence｜>")], ""
    out += [_author(content_of(m)) for _, role, m in _enumerated(record) if role == "system"]
    for index, role, message in _enumerated(record):
        turn, text, functions = _turn(record, index), content_of(message), _functions(message)
        if role == "user":
            out += [_frame("<｜User｜>"), _author(text)]
        elif role == "tool":
            out += [
                _frame("<｜tool▁output▁begin｜>"),
                _author(text),
                _frame("<｜tool▁output▁end｜>"),
            ]
        elif role == "assistant":
            out += [_frame("<｜Assistant｜></think>")] if previous == "user" else []
            _, closing, behind = text.partition("</think>")
            if closing and previous != "tool" and not functions:
                turn, text = turn if trains_stripped else None, behind
            out.append(_author(text, turn))
            out += _deepseek_calls(functions, turn)
            out.append(_frame("<｜end▁of▁sentence｜>", turn))
        previous = role
    return out


def _deepseek_calls(functions: list[Record], turn: int | None) -> Iterator[Piece]:
    if functions:
        yield _frame("<｜tool▁calls▁begin｜>", turn)
        for function in functions:
            yield from (_frame("<｜tool▁call▁begin｜>", turn), _author(function["name"], turn))
            yield from (_frame("<｜tool▁sep｜>", turn), _json(function["arguments"], turn))
            yield _frame("<｜tool▁call▁end｜>", turn)
        yield _frame("<｜tool▁calls▁end｜>", turn)


# Questions and answers without special tokens: `A: ` glues to the answer's first word.


def _plain(record: Record, trains_stripped: bool) -> list[Piece]:
    out: list[Piece] = []
    for index, role, message in _enumerated(record):
        turn = _turn(record, index)
        out += [_frame({"assistant": "A: ", "user": "Q: "}.get(role, ""))]
        out.append(_author(content_of(message), turn))
        out += [_frame("</s>", turn)] if role == "assistant" else []
        out.append(_frame("\n"))
    return out


_QWEN_ADDED: Final = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
_QWEN_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CONTROLS: Final = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
_BARS: Final = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "output▁begin", "output▁end")

FAMILIES: Final = {
    "chatml": Family(_chatml, _QWEN_SPECIAL, _QWEN_ADDED[2:]),
    "qwen3": Family(_qwen3, _QWEN_SPECIAL, _QWEN_ADDED, thinks=True),
    "llama3": Family(
        _llama3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "gemma": Family(
        _gemma,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        has_tools=False,
        alternates=True,
    ),
    "mistral": Family(
        _mistral,
        (
            "<s>",
            "</s>",
            "[TOOL_CALLS]",
            *(f"[{slash}{c}]" for c in _CONTROLS for slash in ("", "/")),
        ),
        bos="<s>",
        eos="</s>",
        alternates=True,
    ),
    "deepseek": Family(
        _deepseek,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        (
            "<｜User｜>",
            "<｜Assistant｜>",
            "<think>",
            "</think>",
            *(f"<｜tool▁{b}｜>" for b in (*_BARS, "sep")),
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        alternates=True,
        thinks=True,
    ),
    "plain": Family(_plain, ("</s>",), eos="</s>", has_tools=False),
}
"""Every family by its name."""


def texts_of(pieces: Iterable[Piece]) -> str:
    """Return the render."""
    return "".join(piece.text for piece in pieces)
