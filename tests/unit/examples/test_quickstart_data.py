"""The quickstart's conversations and tokenizer: the same bytes each time, and well formed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.unit.examples.conftest import Conversations, LoadScript

QUESTION = "What is the first line of the Zen of Python?"


@pytest.fixture(scope="module")
def tokenizer(conversations: Conversations, load_script: LoadScript) -> PreTrainedTokenizerFast:
    script = load_script("2_train_tokenizer.py")
    return script.train_tokenizer(conversations.train_path, vocab_size=2048)


def test_every_category_is_there_and_enough_conversations(conversations: Conversations) -> None:
    assert len(conversations.train) >= 3000
    assert len(conversations.valid) == 100
    for part in (conversations.train, conversations.valid):
        categories = {c["meta"]["category_id"]: c["meta"]["category_name"] for c in part}
        names = {1: "signature", 2: "summary", 3: "module", 4: "walk-through", 5: "zen"}
        assert categories == names


def test_questions_and_answers_alternate(conversations: Conversations) -> None:
    num_turns = Counter()
    for conversation in conversations.train + conversations.valid:
        roles = [message["role"] for message in conversation["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        num_turns[len(roles) // 2] += 1
    assert num_turns.keys() == {1, 2, 3}


def test_texts_are_not_empty_and_hold_no_special_token(conversations: Conversations) -> None:
    for conversation in conversations.train + conversations.valid:
        for message in conversation["messages"]:
            assert message["content"].strip()
            assert "<|" not in message["content"]


def test_the_demo_question_is_repeated_and_has_one_answer(conversations: Conversations) -> None:
    answers = Counter(
        c["messages"][-1]["content"]
        for c in conversations.train
        if [m["content"] for m in c["messages"][:-1]] == [QUESTION]
    )
    assert answers.keys() == {"Beautiful is better than ugly."}
    assert answers.total() >= 40


def test_bytes_do_not_depend_on_the_hash_seed(conversations: Conversations, tmp_path: Path) -> None:
    # The first process had a random hash seed, which orders sets at random.
    again = tmp_path / "again.jsonl"
    flags = ["--output", str(again), "--valid", str(tmp_path / "valid.jsonl")]
    subprocess.run(
        [sys.executable, str(conversations.script), *flags],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert again.read_bytes() == conversations.train_path.read_bytes()


def test_tokenizer_gives_back_the_rendered_text(
    conversations: Conversations, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    strange = [{"role": "user", "content": "  é ☃\t𝄞\n\n<x>  "}]
    for messages in [strange] + [c["messages"] for c in conversations.train[:200]]:
        text = loaded.apply_chat_template(messages, tokenize=False)
        tokens = loaded.apply_chat_template(messages)["input_ids"]
        assert loaded.decode(tokens) == text
        assert tokens.count(loaded.eos_token_id) == len(messages)


def test_vocabulary_is_exact_and_pad_is_not_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 2048
    specials = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert specials == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_vocabulary_larger_than_the_text_is_refused(
    load_script: LoadScript, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(SystemExit, match=r"yields only .* tokens and not 2,048"):
        load_script("2_train_tokenizer.py").train_tokenizer(path, vocab_size=2048)
