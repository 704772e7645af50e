"""Trained spans in templates of every make, against an oracle that writes them down by hand.

A template is put together of parts that published ones have: what the prompt ends in, what stands
where nobody thinks, how tools are called, what ends a turn, whether it is marked as generated. The
oracle knows the parts, not the engine: it says what text of each turn is trained.
"""

import itertools
import json
from typing import Any, Final, NamedTuple

import pytest

from megasft.data.conversation import BadRecordError
from megasft.data.formats import FieldMap, parse
from megasft.data.render import Renderer, RenderOptions

HEADER: Final = "<|im_start|>assistant"
EOS: Final = "<|im_end|>"
SPECIAL: Final = (
    "<|im_start|>", EOS, "<|END_RESPONSE|>", "<|channel|>", "<|message|>", "<|call|>", "<|begin|>",
    "<|arg|>", "<|end_call|>",
)  # fmt: skip
NO_THINKING: Final = ("", "<think>\n\n</think>\n\n", "\n<think></think>\n", "</think>")
STOPS: Final = (EOS, f"<|END_RESPONSE|>{EOS}", f"</answer>{EOS}")
ARGUMENTS: Final = {
    "object": "a | tojson",
    "text": "'' + a",
    "entries": "'<p>' ~ (a.items() | map('join', '=') | join('</p><p>')) ~ '</p>'",
}
CALLS: Final = {
    "json": "'<call>{\"name\": \"' ~ f.name ~ '\", \"arguments\": ' ~ (A) ~ '}</call>' ~ S",
    "channel": "' to=' ~ f.name ~ '<|channel|>json<|message|>' ~ (A) ~ '<|call|>'",
    "id": "'<|begin|>' ~ c.id ~ '<|arg|>' ~ (A) ~ '<|end_call|>' ~ S",
}


class Make(NamedTuple):
    """What a template is put together of."""

    opens_thinking: bool
    no_thinking: str
    stop: str
    call: str
    arguments: str
    tags: str  # none, around the answer, or around its header, too

    def source(self) -> str:
        call = CALLS[self.call].replace("(A)", f"({ARGUMENTS[self.arguments]})")
        call = call.replace("S", repr(self.stop)) if call.endswith("S") else call
        header = f"{{{{- {HEADER!r} }}}}"
        body = (
            "{%- if m.reasoning_content %}"
            "{{- '\\n<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' }}"
            "{%- else %}{{- '\\n' ~ NOTHING }}{% endif %}"
            "{{- m.content or '' }}"
            "{%- if m.tool_calls %}{%- set c = m.tool_calls[0] %}{%- set f = c.function %}"
            "{%- set a = f.arguments %}{{- CALL }}"
            "{%- else %}{{- STOP }}{% endif %}"
        )
        for name, value in (
            ("NOTHING", repr(self.no_thinking)), ("CALL", call), ("STOP", repr(self.stop)),
        ):  # fmt: skip
            body = body.replace(name, value, 1)
        opening, closing = ("{%- generation %}", "{%- endgeneration %}")
        answer = {
            "none": header + body,
            "answer": header + opening + body + closing,
            "header": opening + header + body + closing,
        }[self.tags]
        asks = f"{HEADER}\n<think>\n" if self.opens_thinking else f"{HEADER}\n"
        return (
            "{%- for m in messages %}{%- if m.role == 'assistant' %}" + answer + "{{- '\\n' }}"
            "{%- else %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
            "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- " + repr(asks) + " }}"
            "{%- endif %}"
        )

    def answer(self, text: str, thinking: str = "") -> str:
        """The oracle: what is trained of an answer."""
        opening = "" if self.opens_thinking else "<think>\n"
        thought = f"{opening}{thinking}\n</think>\n\n" if thinking else ""
        return f"{thought}{text}{self.stop}"

    def called(self, name: str, call_id: str, arguments: dict[str, Any]) -> str:
        """The oracle: what is trained of a message that calls a tool."""
        entries = "</p><p>".join(f"{key}={value}" for key, value in arguments.items())
        said = f"<p>{entries}</p>" if self.arguments == "entries" else json.dumps(arguments)
        if self.call == "channel":
            return f" to={name}<|channel|>json<|message|>{said}<|call|>"
        if self.call == "id":
            return f"<|begin|>{call_id}<|arg|>{said}<|end_call|>{self.stop}"
        return f'<call>{{"name": "{name}", "arguments": {said}}}</call>{self.stop}'


_EVERY: Final = [
    Make(*parts)
    for parts in itertools.product(
        (False, True), NO_THINKING, STOPS, CALLS, ARGUMENTS, ("none", "answer", "header")
    )
    if not (parts[0] and parts[1] == "\n<think></think>\n")  # its prompt would not be its render
]
MAKES: Final = _EVERY[::5]
"""5 has no factor in common with the numbers of parts: every pair of parts is there."""
NAME, ID = "get_weather", "functions.get_weather:0"


def spans_of(make: Make, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    renderer = Renderer(
        make.source(),
        special_tokens={"eos_token": EOS},
        stops=SPECIAL,
        options=RenderOptions(**options),
    )
    rendered = renderer.render(parse(json.dumps({"messages": messages}).encode(), FieldMap()))
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(arguments: Any) -> dict[str, Any]:
    function = {"name": NAME, "arguments": arguments}
    return says("", tool_calls=[{"id": ID, "type": "function", "function": function}])


PLAIN: Final = [user("Hi"), says("Hello there."), user("Bye"), says("See you.")]
RESULT: Final = {"role": "tool", "content": "-3", "tool_call_id": ID}


@pytest.mark.parametrize("stop", STOPS)
def test_answers_without_thinking_are_trained_to_the_eos_without_a_think_block(stop: str) -> None:
    makes = [make for make in MAKES if make.stop == stop][::2]
    assert len(makes) >= 15
    for make in makes:
        assert spans_of(make, PLAIN) == [make.answer("Hello there."), make.answer("See you.")], make


@pytest.mark.parametrize("call", CALLS)
def test_a_tool_call_is_trained_to_its_end_wherever_it_stands(call: str) -> None:
    """Last or not; written by its author as an object, or as JSON text, whatever is taken."""
    makes = [make for make in MAKES if make.call == call][::2]
    assert len(makes) >= 15
    arguments = {"city": "Oslo", "days": "3"}
    for make, written in zip(makes, itertools.cycle((arguments, json.dumps(arguments)))):
        asks = [user("Weather?"), calls(written)]
        called = make.called(NAME, ID, arguments)
        assert spans_of(make, asks) == [called], make
        whole = [*asks, RESULT, says("It is cold."), user("And now?"), calls(written)]
        assert spans_of(make, whole) == [called, make.answer("It is cold."), called], make


@pytest.mark.parametrize("tags", ["none", "answer", "header"])
def test_thinking_is_trained_from_where_the_prompt_ends(tags: str) -> None:
    makes = [make for make in MAKES if make.tags == tags][::2]
    assert len(makes) >= 15
    messages = [user("2+2"), says("4", reasoning_content="two and two")]
    for make in makes:
        assert spans_of(make, messages) == [make.answer("4", "two and two")], make


def test_no_thinking_and_no_tool_calls_are_trained_on_demand() -> None:
    for make in (make for make in MAKES[::3] if make.call != "channel"):
        thinks = [user("2+2"), says("4", reasoning_content="two and two")]
        assert spans_of(make, thinks, mask_thinking=True) == [make.answer("4")], make
        asks = [user("Weather?"), calls({"city": "Oslo"}), RESULT, says("It is cold.")]
        cold = [make.answer("It is cold.")]
        assert spans_of(make, asks, mask_tool_calls=True) == cold, make
        asks[1] = asks[1] | {"content": "Let me look."}
        assert spans_of(make, asks, mask_tool_calls=True) == ["Let me look.", *cold], make
        with pytest.raises(BadRecordError, match="--mask-tool-calls"):
            spans_of(make, [user("Weather?"), calls({})], mask_tool_calls=True)


@pytest.mark.parametrize(
    "value",
    [3, 12345678901234567890123, 1.5, True, None, "", 'a "b"\n', "Zürich", [], [1, {"x": 2}], {}],
)
def test_arguments_of_every_type_are_in_the_span(value: Any) -> None:
    for kind, call in itertools.product(("object", "text"), CALLS):
        make = Make(False, "", EOS, call, kind, "none")
        for written in ({"v": value}, json.dumps({"v": value}, ensure_ascii=False)):
            (got,) = spans_of(make, [user("?"), calls(written)])
            said = json.dumps({"v": value}, ensure_ascii=False)
            assert got == make.called(NAME, ID, {"v": 0}).replace('{"v": 0}', said)


def test_arguments_that_cannot_be_what_the_template_takes_are_refused() -> None:
    make = Make(False, "", EOS, "json", "entries", "none")
    for written in ("{", "[1]", "7"):
        with pytest.raises(BadRecordError, match="message 1"):
            spans_of(make, [user("?"), calls(written)])


def test_an_id_that_does_not_name_the_function_is_no_name() -> None:
    asks = calls({"city": "Oslo"})
    asks["tool_calls"][0]["id"] = "call_1"
    make = Make(False, "", EOS, "id", "object", "none")
    with pytest.raises(BadRecordError, match="does not render the tool name"):
        spans_of(make, [user("Weather?"), asks])


@pytest.mark.parametrize("left_out", ["call", "arguments", "thinking"])
def test_a_generation_block_that_leaves_out_a_part_is_refused(left_out: str) -> None:
    parts = {
        "thinking": "{{- m.reasoning_content or '' }}",
        "text": "{{- m.content }}",
        "call": "{%- for c in m.tool_calls or [] %}{{- c.function.name }}{% endfor %}",
        "arguments": "{%- for c in m.tool_calls or [] %}{{- c.function.arguments | tojson }}"
        "{% endfor %}{{- '<|im_end|>' }}",
    }
    outside = {"call": ("call", "arguments"), "arguments": ("arguments",), "thinking": ()}[left_out]
    before = parts.pop("thinking") if left_out == "thinking" else ""
    inside = "".join(text for name, text in parts.items() if name not in outside)
    behind = "".join(parts[name] for name in outside)
    source = (
        "{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' }}"
        "{%- if m.role == 'assistant' %}" + before + "{%- generation %}" + inside
        + "{%- endgeneration %}" + behind + "{%- else %}{{- m.content }}{% endif %}{% endfor %}"
    )  # fmt: skip
    renderer = Renderer(source, special_tokens={"eos_token": EOS}, stops=SPECIAL)
    asks = calls({"city": "Oslo"}) | {"content": "Let me look.", "reasoning_content": "Hm"}
    record = json.dumps({"messages": [user("Weather?"), asks]}).encode()
    with pytest.raises(BadRecordError, match="does not hold all of it"):
        renderer.render(parse(record, FieldMap()))
