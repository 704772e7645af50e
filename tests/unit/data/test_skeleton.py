"""Renders learnt by shape against Jinja's own, and what happens where they cannot be learnt."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.data import render
from megasft.data.chat_template import ChatTemplate
from megasft.data.conversation import (
    BadRecordError,
    Category,
    Conversation,
    UnfaithfulError,
    make_messages,
)
from megasft.data.render import Renderer, RenderOptions
from megasft.data.shape import shape_of
from tests.unit.data import templates

STOPS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>")
QWEN_LIKE = templates.STRIPS_THINKING
TEXTS = st.lists(
    st.sampled_from(["a", "Z", " ", "\n", "\u3000", "<think>", "</think>", "é", "😀", '"', "\\"]),
    max_size=6,
).map("".join)


def conversation(*messages: tuple[str, Any], **record: Any) -> Conversation:
    raw = [
        {"role": role, **(content if isinstance(content, dict) else {"content": content})}
        for role, content in messages
    ]
    return Conversation(make_messages(raw, None), Category(), record.get("tools"))


def chat(*texts: str) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return conversation(*zip(roles, texts, strict=False))


def renderer(template: str, **options: Any) -> Renderer:
    return Renderer(
        template, special_tokens={"bos_token": "<s>"}, stops=STOPS, options=RenderOptions(**options)
    )


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "STRIPS_THINKING", "PLAIN", "STOP_IN_BLOCK"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_learnt_renders_are_the_templates_own(name: str, data: st.DataObject) -> None:
    template = getattr(templates, name)
    learnt, checked = renderer(template), renderer(template, check_all=True)
    jinja = ChatTemplate(template, {"bos_token": "<s>"})
    for _ in range(4):
        texts = data.draw(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
        one = chat(*texts)
        try:
            got = learnt.render(one)
        except BadRecordError:
            with pytest.raises(BadRecordError):
                checked.render(one)
            continue
        assert got == checked.render(one)
        assert got.text == jinja.run([m.as_dict(m.content) for m in one.messages], None)


def test_conversations_of_one_shape_are_learnt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rendering = renderer(templates.CHATML)
    first = rendering.render(chat("Hi", "Hello"))
    runs: list[Any] = []
    monkeypatch.setattr(ChatTemplate, "run", lambda *a, **k: runs.append(a) or "")
    second = rendering.render(chat("A question", "Its answer"))
    assert not runs
    assert second.text == first.text.replace("Hi", "A question").replace("Hello", "Its answer")
    (span,) = second.spans
    assert second.text[span.start : span.end] == "Its answer<|im_end|>"


def test_shapes_tell_blanks_roles_and_thinking_apart_and_nothing_else() -> None:
    def shape(*texts: str) -> object:
        return shape_of(chat(*texts))[0]

    assert shape("Hi", "Hello") == shape("Bye", "See you")
    others = [shape("Hi", " Hello"), shape("Hi\n", "Hello"), shape("", "Hello")]
    others += [shape("Hi", "<think>a</think>b"), shape("Hi", "<think>\na</think>b")]
    assert len({shape("Hi", "Hello"), *others}) == 6
    leaves = shape_of(chat(" Hi\n", "<think>\na b\n</think>\n\nc d "))[1]
    assert leaves == ["Hi", "a b", "c d"]


def test_a_text_the_template_looks_for_is_rendered_by_the_template() -> None:
    shouts = templates.CHATML.replace(
        "message['content'] +",
        "(message['content'] | upper if '!!' in message['content'] else message['content']) +",
    )
    rendering = renderer(shouts)
    assert "Hi" in rendering.render(chat("Hi", "Hello")).text
    text = rendering.render(chat("Hi!!", "Hello")).text
    assert "HI!!" in text
    with pytest.raises(BadRecordError, match="does not render all trained messages"):
        rendering.render(chat("Hi", "Hello!!"))


def decides_by_length() -> str:
    return templates.CHATML.replace(
        "message['content'] +",
        "(message['content'] if message['content'] | length < 20 else 'too long') +",
    )


def test_a_template_that_decides_by_something_else_is_found_out() -> None:
    long = "a text of more than twenty characters"
    rendering = renderer(decides_by_length())
    rendering.render(chat("Hi", "Hello"))
    with pytest.raises(UnfaithfulError, match=r"2 messages \(user, assistant\) is not rendered"):
        rendering.render(chat(long, "Hello"), check=True)
    text = renderer(decides_by_length(), check_all=True).render(chat(long, "Hello")).text
    assert "too long" in text


def test_texts_written_as_json_are_escaped_as_often_as_the_template_does() -> None:
    as_json = (
        "{% for m in messages %}{{ m.role + ': ' + m.content | tojson + '<|im_end|>' }}{% endfor %}"
    )
    text = 'say "hi"\n\\ 你好'
    for nested, levels in ((as_json, 1), (as_json.replace("| tojson", "| tojson | tojson"), 2)):
        rendering = renderer(nested)
        untrained = conversation(("user", text), ("assistant", "fine"))
        got = rendering.render(untrained)
        assert got == renderer(nested, check_all=True).render(untrained)
        assert got.text.count("\\") > 2**levels
        (span,) = got.spans
        assert got.text[span.start : span.end].startswith("fine")


def test_a_template_that_repeats_a_text_is_rendered_with_marks() -> None:
    repeats = templates.CHATML + "{{ messages[0].content }}"
    got = renderer(repeats).render(chat("Hi", "Hello"))
    assert got.text.endswith("Hi")
    (span,) = got.spans
    assert got.text[span.start : span.end] == "Hello<|im_end|>"


def turns(template: str, one: Conversation) -> Sequence[str]:
    got = renderer(template, check_all=True).render(one)
    return [got.text[span.start : span.end] for span in got.spans]


def test_a_turn_begins_where_the_prompt_ends() -> None:
    inst = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    assert turns(inst, chat("Hi", "Hello", "Bye", "See you")) == [
        " Hello<|im_end|>",
        " See you<|im_end|>",
    ]
    channels = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{% if m.role == 'assistant' %}{{ '<final>' }}{% endif %}{{ m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    assert turns(channels, chat("Hi", "Hello")) == ["<final>Hello<|im_end|>"]
    opens_thinking = templates.CHATML.replace(
        "<|im_start|>assistant\\n'", "<|im_start|>assistant\\n<think>\\n'"
    )
    assert opens_thinking != templates.CHATML
    assert turns(opens_thinking, chat("Hi", "<think>\nHm.\n</think>\nHello")) == [
        "Hm.\n</think>\nHello<|im_end|>"
    ]
    assert turns(opens_thinking, chat("Hi", "Hello")) == ["Hello<|im_end|>"]


def test_an_empty_answer_trains_its_stop_token_alone() -> None:
    empty = chat("Hi", "", "Bye", " \n")
    assert turns(templates.CHATML, empty) == ["<|im_end|>", " \n<|im_end|>"]
    two = conversation(("user", "Hi"), ("assistant", ""), ("assistant", ""), ("user", "Yes?"))
    assert turns(templates.CHATML, two) == ["<|im_end|>", "<|im_end|>"]


def test_shapes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_MAX_REMEMBERED", 10_000)
    rendering = renderer(templates.CHATML)
    texts = []
    for number in range(30):
        blanks = " " * number
        texts.append(rendering.render(chat(f"Hi{blanks}", "Hello")).text)
        assert len(rendering._skeletons) <= 10
    assert rendering.render(chat("Hi", "Hello")).text == texts[0]  # forgotten, and learnt again
