from typing import Any

import pytest
from transformers import AutoTokenizer

from megasft.data.conversation import BadRecordError, Category, Conversation, make_messages
from megasft.data.render import Rendered, Renderer, RenderOptions
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.data import templates

STOPS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|assistant|>")


def conversation(*messages: tuple[str, str], labels: list[int] | None = None) -> Conversation:
    raw = [{"role": role, "content": content} for role, content in messages]
    return Conversation(make_messages(raw, labels), Category())


def rendered_by(
    template: str, chat: Conversation, options: RenderOptions | None = None
) -> Rendered:
    renderer = Renderer(
        template,
        special_tokens={"bos_token": "<|bos|>"},
        stops=STOPS,
        options=options or RenderOptions(check_all=True),
    )
    return renderer.render(chat)


def texts_of(rendered: Rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def answers(template: str, chat: Conversation) -> list[str]:
    return texts_of(rendered_by(template, chat))


def reason_of(template: str, chat: Conversation) -> str:
    with pytest.raises(BadRecordError) as caught:
        answers(template, chat)
    return caught.value.reason


TWO_TURNS = conversation(
    ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"),
    ("assistant", "See you."),
)  # fmt: skip


def test_chatml_trains_each_answer_and_its_end_of_turn() -> None:
    assert answers(templates.CHATML, TWO_TURNS) == ["Hello!<|im_end|>", "See you.<|im_end|>"]


def test_a_trimming_template_trains_what_is_left() -> None:
    chat = conversation(("user", " Hi "), ("assistant", "\n Hello! \n"))
    assert answers(templates.LLAMA3, chat) == ["Hello!<|eot_id|>"]
    assert answers(templates.CHATML, chat) == ["\n Hello! \n<|im_end|>"]
    blank = conversation(("user", "Hi"), ("assistant", " \n"))
    assert answers(templates.LLAMA3, blank) == ["<|eot_id|>"]


def test_the_stop_token_behind_a_generation_block_is_trained() -> None:
    assert answers(templates.STOP_BEHIND_BLOCK, TWO_TURNS) == [
        "Hello!<|im_end|>",
        "See you.<|im_end|>",
    ]


def test_blanks_behind_the_stop_token_inside_a_generation_block_are_not_trained() -> None:
    # The block is in a macro, where transformers' own tracker misplaces it.
    assert answers(templates.STOP_IN_BLOCK, TWO_TURNS) == ["Hello!<|im_end|>", "See you.<|im_end|>"]


def test_the_next_role_token_ends_a_turn_where_nothing_else_does() -> None:
    assert answers(templates.NEXT_ROLE_STOPS, TWO_TURNS) == ["Hello!<|user|>", "See you."]


def test_a_template_without_special_tokens_trains_the_bare_answer() -> None:
    assert answers(templates.PLAIN, TWO_TURNS) == ["Hello!", "See you."]


def test_labels_leave_messages_out() -> None:
    chat = conversation(("user", "1"), ("assistant", "2"), ("assistant", "3"), labels=[0, 0, 1])
    for template in (templates.CHATML, templates.STOP_BEHIND_BLOCK, templates.STRIPS_THINKING):
        (answer,) = answers(template, chat)
        assert answer == "3<|im_end|>"


@pytest.mark.parametrize(
    "word", ["user", "assistant", "a", "\n", "", "same", "<think>", "im_end", "|>"]
)
def test_repeated_empty_and_role_named_contents_do_not_confuse(word: str) -> None:
    chat = conversation(
        ("system", word), ("user", word), ("assistant", word), ("user", word), ("assistant", word)
    )
    renderer = Renderer(templates.CHATML, special_tokens={}, stops=STOPS)
    text, spans, *_ = renderer.render(chat)
    header = "<|im_start|>assistant\n"
    first = text.index(header) + len(header)
    second = text.index(header, first + len(word)) + len(header)
    assert [span.start for span in spans] == [first, second]
    assert answers(templates.CHATML, chat) == [f"{word}<|im_end|>"] * 2


THINKING = "<think>\nOne and one.\n</think>\n\nTwo."


def test_thinking_in_the_last_turn_is_trained_whole() -> None:
    chat = conversation(("user", "1+1?"), ("assistant", THINKING))
    assert answers(templates.STRIPS_THINKING, chat) == [f"{THINKING}<|im_end|>"]


def test_an_answer_without_thinking_does_not_train_the_empty_thinking() -> None:
    chat = conversation(("user", "1+1?"), ("assistant", "Two."))
    assert answers(templates.STRIPS_THINKING, chat) == ["Two.<|im_end|>"]


STRIPPED = (("user", "1+1?"), ("assistant", THINKING), ("user", "Sure?"), ("assistant", THINKING))


def test_a_turn_whose_thinking_the_template_strips_is_not_trained_and_counted() -> None:
    rendered = rendered_by(templates.STRIPS_THINKING, conversation(*STRIPPED))
    assert texts_of(rendered) == [f"{THINKING}<|im_end|>"]
    assert rendered.stripped == 1
    context = conversation(*STRIPPED, labels=[0, 0, 0, 1])
    rendered = rendered_by(templates.STRIPS_THINKING, context)
    assert texts_of(rendered) == [f"{THINKING}<|im_end|>"]
    assert rendered.stripped == 0


def test_a_stripped_turn_is_trained_or_rejected_on_request() -> None:
    chat = conversation(*STRIPPED)
    train = RenderOptions(stripped_thinking="train")
    assert texts_of(rendered_by(templates.STRIPS_THINKING, chat, train)) == [
        "Two.<|im_end|>",
        f"{THINKING}<|im_end|>",
    ]
    with pytest.raises(BadRecordError, match="leaves out the thinking of the messages 1") as caught:
        rendered_by(templates.STRIPS_THINKING, chat, RenderOptions(stripped_thinking="reject"))
    assert caught.value.reason == "the template changed the message"
    only_stripped = conversation(*STRIPPED, labels=[0, 1, 0, 0])
    assert reason_of(templates.STRIPS_THINKING, only_stripped) == "nothing to train"


def test_a_reformatted_thinking_is_trained_as_the_model_will_write_it() -> None:
    chat = conversation(("user", "1+1?"), ("assistant", "<think>One and one.</think>Two."))
    assert answers(templates.STRIPS_THINKING, chat) == [f"{THINKING}<|im_end|>"]


def test_a_changed_answer_is_rejected() -> None:
    upper = templates.CHATML.replace("message['content']", "message['content'] | upper")
    assert reason_of(upper, TWO_TURNS) == "the template changed the message"
    twice = templates.CHATML.replace("message['content']", "message['content'] * 2")
    assert reason_of(twice, TWO_TURNS) == "the template changed the message"


def test_a_template_that_looks_at_the_text_is_not_trusted() -> None:
    skips_empty = "{% for m in messages if m.content %}{{ '<' + m.content + '>' }}{% endfor %}"
    chat = conversation(("user", "Hi"), ("assistant", ""))
    assert reason_of(skips_empty, chat) == "the template changed the message"
    counts = (
        "{% for m in messages %}{% set answer %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}{{ answer | length }} {{ answer }}{% endfor %}"
    )
    chat = conversation(("assistant", "Hello"))  # 5 characters; with marks around, 7
    assert reason_of(counts, chat) == "the template changed the message"


def test_what_a_template_refuses_is_a_reason() -> None:
    assert reason_of(templates.REFUSES_SYSTEM, TWO_TURNS) == "the template refused"


def tool_call() -> Conversation:
    call: dict[str, Any] = {"type": "function", "function": {"name": "add", "arguments": {}}}
    raw = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [call]}]
    return Conversation(make_messages(raw, None), Category())


def test_a_tool_call_is_trained_whole() -> None:
    calls = templates.CHATML.replace(
        "message['content'] +",
        "(message['content'] or '') + ('<call>' + message.tool_calls[0].function.name + '</call>'"
        " if message.tool_calls else '') +",
    )
    assert calls != templates.CHATML
    assert answers(calls, tool_call()) == ["<call>add</call><|im_end|>"]
    block = templates.STOP_BEHIND_BLOCK.replace(
        "{{ message['content'] }}{% for", "{{ message['content'] or '' }}{% for"
    )
    assert block != templates.STOP_BEHIND_BLOCK
    assert answers(block, tool_call()) == ["<call>add<|im_end|>"]


def test_a_tool_call_the_template_does_not_render_is_not_dropped_in_silence() -> None:
    ignores = templates.CHATML.replace("message['content'] +", "(message['content'] or '') +")
    assert reason_of(ignores, tool_call()) == "the template changed the message"
    assert reason_of(templates.CHATML, tool_call()) == "the template refused"


def test_reasoning_the_template_drops_is_not_dropped_in_silence() -> None:
    raw = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
    ]
    chat = Conversation(make_messages(raw, None), Category())
    assert reason_of(templates.CHATML, chat) == "nothing to train"
    assert reason_of(templates.STOP_IN_BLOCK, chat) == "nothing to train"


@pytest.mark.parametrize(
    "name",
    ["CHATML", "LLAMA3", "STOP_BEHIND_BLOCK", "STOP_IN_BLOCK", "STRIPS_THINKING", "PLAIN"],
)
def test_renders_equal_those_of_transformers(name: str, tmp_path: Any) -> None:
    template = getattr(templates, name)
    hf = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, chat_template=template))
    hf.bos_token = "<|endoftext|>"
    renderer = Renderer(template, special_tokens=hf.special_tokens_map, stops=STOPS)
    messages = [m.as_dict(m.content) for m in TWO_TURNS.messages]
    expected = hf.apply_chat_template(messages, tokenize=False)
    assert renderer.render(TWO_TURNS).text == expected
    assert len(expected) > 50


def test_a_template_that_asks_for_the_date_always_gets_the_same() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + templates.CHATML
    text, *_ = Renderer(template, special_tokens={}, stops=STOPS).render(TWO_TURNS)
    assert text.startswith("26 Jul 2024<|im_start|>")
