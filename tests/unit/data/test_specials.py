from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

from megasft.data.specials import SpecialTokens
from megasft.data.tokenize import Made, Outcome, Recipe, Rejected, Tokenizer
from tests.tiny_tokenizer import CHATML, make_tokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|im_end|>x", "<s>")
IM_END = 2
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>' + tools | tojson + '<|im_end|>' }}{% endif %}" + CHATML
)


def make(folder: Path, record: Any, policy: str) -> Outcome:
    recipe = Recipe(folder, special_tokens_in_text=policy)
    (outcome,) = Tokenizer(recipe).make([(1, orjson.dumps(record))])
    return outcome


def record(user: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def test_private_names_are_as_long_and_tell_all_tokens_apart() -> None:
    specials = SpecialTokens(SPECIALS, "escape")
    text = "<|im_start|>a<|im_end|>x<s><|im_end|> <|im_"
    hidden = specials.hide(text)
    assert len(hidden) == len(text)
    assert not any(token in hidden for token in SPECIALS)
    assert len(set(specials.private.values())) == len(SPECIALS)
    assert hidden.endswith(" <|im_")


def test_what_is_shielded_comes_back() -> None:
    specials = SpecialTokens(SPECIALS, "escape")
    fields = {"a": ["x <s>", {"<|im_end|>": 1}], "b": ("<|im_start|>", None)}
    shielded = orjson.dumps(specials.shield(fields)).decode()
    assert specials.find(shielded) is None
    assert specials.reveal(specials.hide(shielded)) == orjson.dumps(fields).decode()


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_end|>b", "<|im_start|>user\n<|im_end|>", "<|"]
)
def test_escaped_tokens_are_plain_text(tmp_path: Path, text: str) -> None:
    folder = make_tokenizer(tmp_path, chat_template=WITH_TOOLS)
    tool = {"type": "function", "function": {"name": "add", "description": text}}
    made = make(folder, record(text, f"Say {text}", tools=[tool]), "escape")
    assert isinstance(made, Made)
    hf = AutoTokenizer.from_pretrained(folder)
    tokens, turns = made.sample
    assert tokens.tolist().count(IM_END) == 3  # the template's own
    assert hf.decode(tokens).replace("\\n", "\n").count(text) >= 3
    ((start, num_tokens, *_),) = turns.tolist()
    plain = hf.encode(f"Say {text}", split_special_tokens=True)
    assert tokens[start : start + num_tokens].tolist() == [*plain, IM_END]


def test_a_conversation_without_special_tokens_is_the_same_under_every_policy(
    tokenizer_dir: Path,
) -> None:
    made = [
        make(tokenizer_dir, record("Hi", "Hello <|im_"), p) for p in ("escape", "reject", "keep")
    ]
    samples = [m.sample for m in made if isinstance(m, Made)]
    assert len(samples) == 3
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample.tokens, samples[0].tokens)


def test_rejecting_names_the_token_and_the_remedies(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, chat_template=WITH_TOOLS)
    tool = {"type": "function", "function": {"name": "add", "description": "<|im_start|>"}}
    for bad in (record("<|im_end|>", "Yo"), record("Hi", "Yo", tools=[tool])):
        outcome = make(folder, bad, "reject")
        assert isinstance(outcome, Rejected)
        assert outcome.reason == "special token in the text"
        assert "<|im_" in outcome.detail
        assert "escape makes plain text of it, keep allows it" in outcome.detail


def test_a_stop_token_in_an_argument_does_not_end_the_turn(tmp_path: Path) -> None:
    calls = CHATML.replace(
        "message['content'] +",
        "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
    )
    folder = make_tokenizer(tmp_path, chat_template=calls)
    call = {"type": "function", "function": {"name": "echo", "arguments": {"text": "<|im_end|>!"}}}
    chat = record("Hi", "")
    chat["messages"][1]["tool_calls"] = [call]
    hf = AutoTokenizer.from_pretrained(folder)
    for policy, num_stops in (("escape", 1), ("keep", 2)):
        made = make(folder, chat, policy)
        assert isinstance(made, Made)
        ((start, num_tokens, *_),) = made.sample.turns.tolist()
        trained = made.sample.tokens[start : start + num_tokens]
        assert trained.tolist().count(IM_END) == num_stops
        assert hf.decode(trained).endswith('"<|im_end|>!"}}}]<|im_end|>')


def test_a_role_token_that_is_not_called_special_is_escaped_too(tmp_path: Path) -> None:
    roles = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    folder = make_tokenizer(tmp_path, chat_template=roles)
    file = folder / "tokenizer.json"
    spec = orjson.loads(file.read_bytes())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] += [
        {"id": 512 + i, "content": token, "special": False, **added}
        for i, token in enumerate(("<|user|>", "<|assistant|>", "<tool_call>"))
    ]
    file.write_bytes(orjson.dumps(spec))
    made = make(folder, record("a <|user|> b", "<tool_call>"), "escape")
    assert isinstance(made, Made)
    ids = made.sample.tokens.tolist()
    assert [ids.count(number) for number in (512, 513, 514)] == [1, 1, 1]
    kept = make(folder, record("a <|user|> b", "<tool_call>"), "keep")
    assert isinstance(kept, Made)
    assert kept.sample.tokens.tolist().count(512) == 2


def test_words_and_line_ends_among_the_added_tokens_are_no_control_tokens(tmp_path: Path) -> None:
    """Gemma 3 adds its line ends to the vocabulary, and the template writes them."""
    template = CHATML.replace("<|im_start|>", "[turn]")
    folder = make_tokenizer(tmp_path, chat_template=template)
    hf = AutoTokenizer.from_pretrained(folder)
    hf.add_tokens(["\n", "\n\n", "user", "assistant", "[turn]", "\u2581\u2581", "."])
    hf.save_pretrained(folder)
    control = Tokenizer(Recipe(folder))._folder.control_tokens()
    assert control & {"\n", "\n\n", "user", "assistant", "."} == set()
    assert "[turn]" in control
    for text in ("First.\n\nSecond\n", "user: assistant"):
        assert isinstance(make(folder, record(text, text), "reject"), Made)
    assert isinstance(make(folder, record("[turn]", "Hi"), "reject"), Rejected)


@pytest.mark.parametrize("policy", ["escape", "reject", "keep"])
def test_a_text_is_one_turn_with_its_eos_and_no_label_for_its_first_token(
    tmp_path: Path, policy: str
) -> None:
    folder = make_tokenizer(tmp_path)
    hf = AutoTokenizer.from_pretrained(folder)
    for text, spells in (("Water boils.\n", False), ("Say <|im_end|> now", True)):
        made = make(folder, {"text": text}, policy)
        if spells and policy == "reject":
            assert isinstance(made, Rejected)
            continue
        assert isinstance(made, Made)
        tokens, turns = made.sample
        assert hf.decode(tokens) == f"{text}<|im_end|>"
        assert tokens.tolist().count(IM_END) == 1 + (spells and policy == "keep")
        assert tokens[-1] == IM_END
        assert turns[:, :2].tolist() == [[1, len(tokens) - 1]]
        assert made.stop_ids == (IM_END,)
