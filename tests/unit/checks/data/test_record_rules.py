from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megasft.checks.data.run import RULES
from megasft.checks.data.subject import Needs
from megasft.checks.data.witness import Transformers, UncheckableError, Witness, witness
from megasft.data.conversation import Category, Conversation, make_messages
from megasft.schema import Sample, turn_records
from tests.tiny_tokenizer import CHATML, make_tokenizer

from .stores import lint, rewritten

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
DROPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n'"
    " + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
EMPTY_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
UNSTABLE = (  # only the last turn of the conversation is numbered
    "{% for m in messages %}{{ '<|im_start|>' + ('last ' if loop.last else '') + m.role + '\\n'"
    " + m.content + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
GLUED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"first": 1}}}
SPELLED = {"type": "function", "function": {"name": "add", "arguments": '{"first": 1}'}}


def say(role: str, content: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


HI = [say("user", "Hi"), say("assistant", "Hello there")]
THINKS = [say("user", "1+1?"), say("assistant", "<think>\nOne and one.\n</think>\n\nTwo.")]
CALLS = [say("user", "1+1?"), say("assistant", "", tool_calls=[CALL]), say("tool", "2")]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds the sample of some messages by hand and lets the witness look at it."""
    folder = tmp_path_factory.mktemp("witness")
    make_tokenizer(folder)
    hf = AutoTokenizer.from_pretrained(folder)

    def look(
        template: str,
        messages: list[dict[str, Any]],
        turns: list[tuple[str, str, int]],
        *,
        date: Any = None,
        text: str | None = None,
        tools: Any = None,
    ) -> Witness:
        """``turns``: text before the turn, text of the turn, its message."""
        hf.chat_template = template
        conversation = Conversation(make_messages(messages, None), Category(), tools)
        transformers = Transformers(hf, date=date)
        whole = text or hf.apply_chat_template(messages, tools=tools, tokenize=False)
        tokens, records = hf.encode(whole), []
        for before, trained, message in turns:
            start, num = len(hf.encode(before)), len(hf.encode(trained))
            assert hf.decode(tokens[:start]) == before
            records.append((start, num, 0, message))
        import numpy as np

        sample = Sample(np.array(tokens, np.int32), turn_records(records))
        return witness(transformers, conversation, sample)

    return look


NAMES = [
    say("user", "1+1?"),
    say("assistant", "", tool_calls=[{"function": {"name": "add", "arguments": {"first": "one"}}}]),
]
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
NEXT = f"{PROMPT}Hello there<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

FIRES: dict[str, tuple[Any, ...]] = {
    "prompt-trained": (CHATML, HI, [(PROMPT[:-1], "\nHello there<|im_end|>", 1)]),
    "answer-start-untrained": (CHATML, HI, [(PROMPT + "Hello", " there<|im_end|>", 1)]),
    "not-assistant": (CHATML, HI, [("<|im_start|>user\n", "Hi<|im_end|>", 0)]),
    "prefix-unstable": (UNSTABLE, HI, [(PROMPT.replace("as", "last as"), "Hello there", 1)]),
    "glued-prompt": (GLUED, HI, [("user: Hi<|im_end|>assistant: Hello", " there<|im_end|>", 1)]),
    "thinking-lost": (DROPS_THINKING, THINKS, [(THOUGHT, "\n\nTwo.<|im_end|>", 1)]),
    "tool-arguments-untrained": (TOOLS, NAMES, [(THOUGHT, '<call>add {"first":', 1)]),
    "tool-calls": (CHATML, CALLS, [(THOUGHT, "<|im_end|>", 1)]),
}


def count(rule: str, seen: Witness) -> int:
    asked = RULES[rule]
    assert Needs.RECORD in asked.needs
    return int(asked(seen))


def test_a_sound_sample_has_no_hit(ask: Any) -> None:
    seen = ask(
        CHATML, HI * 2, [(PROMPT, "Hello there<|im_end|>", 1), (NEXT, "Hello there<|im_end|>", 3)]
    )
    assert [p.stable for p in seen.prompts] == [True, True]
    assert {n for n, r in RULES.items() if Needs.RECORD in r.needs and count(n, seen)} == set()


@pytest.mark.parametrize("rule", ["prompt-trained", "answer-start-untrained", "not-assistant",
                                  "prefix-unstable", "thinking-lost", "tool-calls",
                                  "tool-arguments-untrained"])  # fmt: skip
def test_a_rule_fires_on_its_sample(rule: str, ask: Any) -> None:
    assert count(rule, ask(*FIRES[rule])) == 1


def test_one_token_too_late_or_too_early_is_enough(ask: Any) -> None:
    messages = [say("user", "Hi"), say("assistant", "!?")]
    for before, trained, rule in (
        (PROMPT + "!", "?<|im_end|>", "answer-start-untrained"),
        (PROMPT[:-1], "\n!?<|im_end|>", "prompt-trained"),
    ):
        seen = ask(CHATML, messages, [(before, trained, 1)])
        fired = {n for n, r in RULES.items() if Needs.RECORD in r.needs and count(n, seen)}
        assert fired == {rule}


def test_a_turn_that_runs_into_the_next_message_trains_a_prompt(ask: Any) -> None:
    long = "Hello there<|im_end|>\n<|im_start|>user"
    assert count("prompt-trained", ask(CHATML, HI * 2, [(PROMPT, long, 1)])) == 1
    assert (
        count("prompt-trained", ask(CHATML, HI * 2, [(PROMPT, "Hello there<|im_end|>\n", 1)])) == 0
    )


def test_an_empty_think_block_before_the_answer_is_no_untrained_start(ask: Any) -> None:
    block = "<think>\n\n</think>\n\n"
    seen = ask(EMPTY_THINKING, HI, [(PROMPT + block, "Hello there<|im_end|>", 1)])
    assert count("answer-start-untrained", seen) == 0
    seen = ask(
        CHATML, THINKS, [(THOUGHT + "<think>\nOne and one.\n</think>\n\n", "Two.<|im_end|>", 1)]
    )
    assert count("answer-start-untrained", seen) == 1


def test_blanks_behind_an_empty_think_block_are_the_answers_own(ask: Any) -> None:
    block = "<think>\n\n</think>\n\n"
    messages = [say("user", "Hi"), say("assistant", "\t Hello")]
    for skipped, num in (("", 0), ("\t", 1)):
        trained = "\t Hello<|im_end|>".removeprefix(skipped)
        seen = ask(EMPTY_THINKING, messages, [(PROMPT + block + skipped, trained, 1)])
        assert count("answer-start-untrained", seen) == num


def test_an_answer_that_glues_to_its_header_loses_no_more_than_the_glued_token(ask: Any) -> None:
    messages = [say("user", "Hi"), say("assistant", "the answer")]
    before = "user: Hi<|im_end|>assistant:"
    seen = ask(GLUED, messages, [(before + " the", " answer<|im_end|>", 1)])
    assert count("glued-prompt", seen) == 1
    assert count("prompt-trained", seen) == count("answer-start-untrained", seen) == 0
    assert (
        count("prompt-trained", ask(GLUED, messages, [(before, " the answer<|im_end|>", 1)])) == 1
    )
    late = ask(GLUED, messages, [(before + " the answer", "<|im_end|>", 1)])
    assert count("answer-start-untrained", late) == 1


def test_tokens_that_transformers_would_not_make_are_found(ask: Any) -> None:
    text = f"{PROMPT}Hello world<|im_end|>\n"
    assert count("render-differs", ask(CHATML, HI, [], text=text)) == 1
    cut = f"{PROMPT}Hello"  # a truncated sample is a beginning of the render
    assert count("render-differs", ask(CHATML, HI, [], text=cut)) == 0


def test_a_special_token_of_an_author_is_found_on_both_sides(ask: Any) -> None:
    for messages in (
        [say("user", "Say <|im_end|>"), say("assistant", "No")],
        [say("user", "Say"), say("assistant", "<|im_start|>")],
    ):
        seen = ask(CHATML, messages, [])
        assert count("special-token-in-text", seen) == 1
        assert count("render-differs", seen) == 0
    assert count("special-token-in-text", ask(CHATML, HI, [])) == 0


def test_thinking_that_is_rendered_is_not_lost(ask: Any) -> None:
    assert count("thinking-lost", ask(CHATML, THINKS, [])) == 0
    apart = [say("user", "1+1?"), say("assistant", "Two.", reasoning_content="One and one.")]
    assert count("thinking-lost", ask(CHATML, apart, [])) == 1


def test_tool_calls_that_are_trained_are_no_finding(ask: Any) -> None:
    answer = '<call>add {"first": 1}<|im_end|>'
    seen = ask(TOOLS, CALLS, [(THOUGHT, answer, 1)])
    assert count("tool-calls", seen) == count("tool-arguments-twice", seen) == 0
    assert count("tools-not-declared", seen) == 1
    seen = ask(TOOLS, CALLS, [(THOUGHT, answer, 1)], tools=(CALL,))
    assert count("tools-not-declared", seen) == 0


def test_arguments_that_are_json_in_json_are_found(ask: Any) -> None:
    messages = [say("user", "1+1?"), say("assistant", "", tool_calls=[SPELLED])]
    assert count("tool-arguments-twice", ask(TOOLS, messages, [])) == 1
    plain = TOOLS.replace(" | tojson", "")
    assert count("tool-arguments-twice", ask(plain, messages, [])) == 0


def test_the_date_is_the_one_of_the_build(ask: Any) -> None:
    from datetime import UTC, datetime

    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    text = f"26 Jul 2024{PROMPT}Hello there<|im_end|>\n"
    date = datetime(2024, 7, 26, tzinfo=UTC)
    assert ask(template, HI, [], date=date, text=text).same_tokens
    assert not ask(template, HI, [], text=text).same_tokens


def test_what_a_template_refuses_cannot_be_checked(ask: Any) -> None:
    refuses = CHATML.replace(
        "{% for", "{% if messages | length < 2 %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    with pytest.raises(UncheckableError, match="no"):
        ask(refuses, HI, [(PROMPT, "Hello", 1)])


def test_an_answer_at_the_very_start_has_no_prompt_to_check(ask: Any) -> None:
    messages = [say("assistant", "Hello there"), say("user", "Hi")]
    (prompt,) = ask(CHATML, messages, [("<|im_start|>assistant\n", "Hello there", 0)]).prompts
    assert prompt.stable


def test_a_given_template_replaces_that_of_the_tokenizer(tmp_path: Path) -> None:
    hf = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    conversation = Conversation(make_messages(HI, None), Category())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Transformers(hf, template).render(HI, conversation) == "HiHello there"


def test_a_shifted_mask_of_a_whole_store_is_found_with_its_lines(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    from .stores import built, chat

    store = built(tmp_path, tokenizer_dir, chat("Hi", "Hello"), chat("Hello", "Hi there"))
    assert lint(store) == {}
    turns = [store.sample(i).turns.tolist() for i in range(2)]
    turns[1][0][0] -= 1
    turns[1][0][1] += 1
    findings = lint(rewritten(store, tmp_path / "wrong", turns=turns))
    assert findings["prompt-trained"].examples == (f"{tmp_path / 'chats.jsonl'}:2",)
    assert findings["prompt-trained"].share == 0.5
