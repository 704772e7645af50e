"""Habits of published templates that decide where a turn begins and ends, a small template each."""

import json
from typing import Any, Final

import pytest

from megasft.data.conversation import BadRecordError
from megasft.data.formats import FieldMap, parse
from megasft.data.render import Renderer, RenderOptions

EOS: Final = "<|end|>"
SPECIAL: Final = (
    EOS, "<|start|>", "<|bot|>", "<|user|>", "<|START_THINKING|>", "<|END_THINKING|>",
    "<|START_TEXT|>", "<|END_TEXT|>", "<|open|>", "<|close|>", "<|sep|>",
)  # fmt: skip
CALL: Final = "{%- for c in m.tool_calls or [] %}{{- '<call>' ~ c.function.name ~ '(' }}" \
    "{{- c.function.arguments | tojson ~ ')' }}{%- endfor %}"  # fmt: skip


def template(answer: str, prompt: str, behind: str = "") -> str:
    """Return a template: how an answer is written, what asks for one, what follows them all."""
    return (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}" + answer
        + "{%- else %}{{- '<|start|><|user|>' ~ m.content ~ '<|end|>' }}{%- endif %}{%- endfor %}"
        + behind + "{%- if add_generation_prompt %}{{- '" + prompt + "' }}{%- endif %}"
    )  # fmt: skip


def trained(source: str, *answers: dict[str, Any], **options: Any) -> list[str]:
    messages: list[dict[str, Any]] = []
    for answer in answers:
        messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", **answer}]
    return spans(source, messages, **options)


def spans(source: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    renderer = Renderer(
        source,
        special_tokens={"eos_token": EOS},
        stops=SPECIAL,
        options=RenderOptions(**options),
    )
    rendered = renderer.render(parse(json.dumps({"messages": messages}).encode(), FieldMap()))
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def calls(arguments: Any = None, name: str = "get_weather", content: str = "") -> dict[str, Any]:
    function = {"name": name, "arguments": {"city": "Oslo"} if arguments is None else arguments}
    return {"content": content, "tool_calls": [{"type": "function", "function": function}]}


YO: Final = {"content": "Yo"}
THINKS: Final = {"content": "Yo", "reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<mm:think>", "</mm:think>"),
        ("<think:open>", "</think:open>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ],
)
@pytest.mark.parametrize("asks", ["opens", "closes", "neither"])
def test_a_closing_tag_alone_is_an_empty_think_block(opening: str, closing: str, asks: str) -> None:
    """GLM 4.7, DeepSeek V3.2, MiniMax M3, Spark 2.5, Hy3, Kimi K3."""
    answer = (
        "{{- '<|start|><|bot|>' }}{%- if m.reasoning_content %}"
        "{{- '" + opening + "' ~ m.reasoning_content }}{%- endif %}"
        "{{- '" + closing + "' ~ m.content }}" + CALL + "{{- '<|end|>' }}"
    )  # fmt: skip
    prompt = "<|start|><|bot|>" + {"opens": opening, "closes": closing, "neither": ""}[asks]
    source = template(answer, prompt)
    called = '<call>get_weather({"city": "Oslo"})<|end|>'
    assert trained(source, YO, calls()) == ["Yo<|end|>", called]
    assert trained(source, calls(content="\n\nSo: ")) == [f"\n\nSo: {called}"]
    opened = "" if asks == "opens" else opening
    assert trained(source, THINKS) == [f"{opened}Hm{closing}Yo<|end|>"]
    assert trained(source, THINKS, mask_thinking=True) == ["Yo<|end|>"]


@pytest.mark.parametrize("always", [False, True])
def test_a_turn_begins_where_the_prompt_and_an_answer_part(always: bool) -> None:
    """Cohere's prompts open the thinking; an answer without any begins with another token.

    Command R7B asks at the end of every render, wanted or not.
    """
    answer = (
        "{{- '<|start|><|bot|>' }}{%- if m.reasoning_content %}"
        "{{- '<|START_THINKING|>' ~ m.reasoning_content ~ '<|END_THINKING|>' }}{%- endif %}"
        "{%- if m.content %}{{- '<|START_TEXT|>' ~ m.content ~ '<|END_TEXT|>' }}{%- endif %}"
        + CALL + "{{- '<|end|>' }}"
    )  # fmt: skip
    prompt = "<|start|><|bot|><|START_THINKING|>"
    source = template(answer, "" if always else prompt, prompt if always else "")
    called = '<call>get_weather({"city": "Oslo"})<|end|>'
    said = "<|START_TEXT|>Yo<|END_TEXT|><|end|>"
    assert trained(source, YO, calls(), YO) == [said, called, said]
    assert trained(source, THINKS, YO) == [f"Hm<|END_THINKING|>{said}", said]


def test_closing_tags_of_tokens_and_words_belong_to_the_turn() -> None:
    """Kimi K3 ends a message with `<|close|>response<|sep|>` and more before its eos."""
    answer = (
        "{{- '<|start|><|bot|><|open|>text<|sep|>' ~ m.content ~ '<|close|>text<|sep|>' }}"
        + CALL + "{{- '<|close|>message<|sep|><|end|>' }}"
    )  # fmt: skip
    source = template(answer, "<|start|><|bot|>")
    closed = "<|close|>text<|sep|><|close|>message<|sep|><|end|>"
    assert trained(source, YO, YO) == [f"<|open|>text<|sep|>Yo{closed}"] * 2


@pytest.mark.parametrize("answer", [YO, calls()])
def test_what_a_template_adds_behind_the_last_turn_is_not_trained(answer: dict[str, Any]) -> None:
    """Command R+ ends no call, and writes an instruction for the next one."""
    source = template(
        "{{- '<|start|><|bot|>' ~ m.content ~ ('' if m.tool_calls else '<|end|>') }}" + CALL,
        "<|start|><|bot|>",
        "{{- '<|start|><|user|>Write a call.<|end|>' }}",
    )
    said = '<call>get_weather({"city": "Oslo"})<|start|>' if "tool_calls" in answer else "Yo<|end|>"
    assert trained(source, answer) == [said]


@pytest.mark.parametrize("knows_thinking", [True, False])
def test_a_call_is_trained_where_its_answer_takes_its_thinking_away(knows_thinking: bool) -> None:
    """gpt-oss: shown while the call is the last message, left out when its answer is there."""
    key = "reasoning_content" if knows_thinking else "other"
    source = template(
        "{{- '<|start|><|bot|>' }}{%- if m." + key + " and (loop.last or not m.tool_calls) %}"
        "{{- '<think>' ~ m." + key + " ~ '</think>' }}{%- endif %}{{- m.content }}" + CALL
        + "{{- '<|end|>' }}",
        "<|start|><|bot|>",
    ).replace("<|start|><|user|>", "<|start|><|' ~ m.role ~ '|>")  # fmt: skip
    asks = [{"role": "user", "content": "Hi"}, {"role": "assistant", **calls(), **THINKS}]
    asks[1]["content"] = ""
    answered = [*asks, {"role": "tool", "content": "-3"}, {"role": "assistant", **THINKS}]
    called, said = '<call>get_weather({"city": "Oslo"})<|end|>', "<think>Hm</think>Yo<|end|>"
    if not knows_thinking:
        with pytest.raises(BadRecordError, match="leaves out the thinking of all"):
            spans(source, answered)
        return
    assert spans(source, asks) == [f"<think>Hm</think>{called}"]
    assert spans(source, answered) == [called, said]
    assert spans(source, [*answered, *answered]) == [said, called, said]  # an earlier one is not
    with pytest.raises(BadRecordError, match="leaves out the thinking"):
        spans(source, answered, stripped_thinking="reject")


def test_a_message_written_with_two_headers_is_two_turns() -> None:
    """Nemotron Nano v2 begins another message for the call; the header between is a prompt."""
    head = "{{- '<|start|><|bot|>' }}"
    source = template(
        head + "{{- m.content ~ '<|end|>' }}{%- if m.tool_calls %}" + head + CALL
        + "{{- '<|end|>' }}{%- endif %}",
        "<|start|><|bot|>",
    )  # fmt: skip
    called = '<call>get_weather({"city": "Oslo"})<|end|>'
    assert trained(source, calls(content="So"), YO) == ["So<|end|>", called, "Yo<|end|>"]


def test_a_name_is_found_where_the_template_escapes_quotes() -> None:
    answer = (
        "{{- '<|start|><|bot|>' ~ m.content }}{%- for c in m.tool_calls or [] %}"
        "{{- '<call name=\"' ~ (c.function.name | e) ~ '\">' ~ c.function.arguments | tojson }}"
        "{%- endfor %}{{- '<|end|>' }}"
    )
    called = '<call name="get_weather">{"city": "Oslo"}<|end|>'
    assert trained(template(answer, "<|start|><|bot|>"), calls()) == [called]


def test_arguments_that_would_be_put_in_braces_twice_are_given_as_an_object() -> None:
    """Gemma 4 writes the entries of an object, or a text as it is, between braces of its own."""
    answer = (
        "{{- '<|start|><|bot|>' ~ m.content }}{%- for c in m.tool_calls or [] %}"
        "{%- set a = c.function.arguments %}{{- c.function.name ~ '{' }}{%- if a is mapping %}"
        "{%- for k, v in a.items() %}{{- k ~ ':' ~ v }}{%- endfor %}{%- else %}{{- a }}"
        "{%- endif %}{{- '}' }}{%- endfor %}{{- '<|end|>' }}"
    )
    source = template(answer, "<|start|><|bot|>")
    for written in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        assert trained(source, calls(written)) == ["get_weather{city:Oslo}<|end|>"]
