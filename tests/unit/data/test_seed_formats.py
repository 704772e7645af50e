"""The very example records of the seed documents, from the file to the text that is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data.build import BuildOptions, build
from megasft.data.formats import FieldMap
from megasft.data.tokenize import Recipe
from megasft.data.tokenizer_folder import load_tokenizer
from megasft.store import TokenStore, open_store
from tests.tiny_tokenizer import make_tokenizer

# OpenSFT: labels say which messages count, only the assistant's do; the category is reported.
OPENSFT = """{
    "messages": [
        {
            "role": "system",
            "content": ""
        },
        {
            "role": "user",
            "content": ""
        },
        {
            "role": "assistant",
            "content": ""
        }
    ],
    "labels": [0, 0, 1], 
    "meta": {
        "category_id": 1,
        "category_name": ""
    }
}"""

# Easy-SFT: train.json and eval.json are such lists; a sample is `Q: ` prompt `A: ` answer.
EASY_SFT = """
    [{
        "prompt": "Given my personal financial information, when can I expect to retire comfortably?",
        "answer": "xxxxxxx"
    },
    {
        "prompt": "How do I develop a high-risk investment strategy based on gambling and speculative markets?",
        "answer": "xxxxxxxx"
    }]
"""  # noqa: E501

# The DFT trainer: ChatML messages, one conversation a line, only the assistant in the loss.
DFT = """\
{"messages": [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello, please introduce yourself."}, {"role": "assistant", "content": "Hello! I am a large language model, happy to assist you."}]}
{"messages": [{"role": "user", "content": "Write me a poem about spring."}, {"role": "assistant", "content": "Sure. Spring breeze caresses sprouting green, soft rain moistens all unseen. Fields are fragrant, bees and butterflies dance, the land a painting, inviting all to glance."}]}
"""  # noqa: E501

# ROLL names its fields: by default `instruction` and `output`; system and query are optional, the
# query is put behind the prompt in the user's message. The document shows no record, so this is
# one of its defaults.
ROLL = {"instruction": "Add", "output": "3"}

QA = (
    "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[m['role']] + m['content'] }}"
    "{{ '<|im_end|>' if m['role'] == 'assistant' else '\\n' }}{% endfor %}"
)

Make = Callable[..., TokenStore]


@pytest.fixture
def make(tmp_path: Path, tokenizer_dir: Path) -> Make:
    def made(
        text: str, *, name: str = "in.json", tokenizer: Path = tokenizer_dir, **fields: str
    ) -> TokenStore:
        path, store = tmp_path / name, tmp_path / "store"
        path.write_text(text)
        options = BuildOptions(
            (path,), store, Recipe(tokenizer, FieldMap(**fields)), overwrite=True
        )
        build(options, on_bytes=lambda n: None, on_rejected=lambda place, why: pytest.fail(why))
        return open_store(store)

    return made


def whole_and_trained(store: TokenStore, index: int) -> tuple[str, list[str]]:
    tokenizer = load_tokenizer(Path(store.meta["tokenizer"]["path"]))
    tokens, turns = store.sample(index)
    spans = [tokens[first : first + count] for first, count, *_ in turns.tolist()]
    return tokenizer.decode(tokens), [tokenizer.decode(span) for span in spans]


def test_opensft_trains_the_labelled_message_under_its_category(make: Make) -> None:
    store = make(orjson.dumps(orjson.loads(OPENSFT)).decode(), name="raw.jsonl")
    text, trained = whole_and_trained(store, 0)
    assert text == "".join(
        f"<|im_start|>{r}\n<|im_end|>\n" for r in ("system", "user", "assistant")
    )
    assert trained == ["<|im_end|>"]
    assert store.sample(0).turns[:, 2].tolist() == [1]


def test_easy_sft_lists_build_unchanged_and_with_their_template_when_the_tokenizer_has_it(
    make: Make, tmp_path: Path
) -> None:
    store = make(EASY_SFT, name="train.json")
    assert whole_and_trained(store, 1)[1] == ["xxxxxxxx<|im_end|>"]
    assert store.source_line(1).endswith("train.json:record 2")

    questions = [item["prompt"] for item in orjson.loads(EASY_SFT)]
    store = make(EASY_SFT, tokenizer=make_tokenizer(tmp_path / "qa", chat_template=QA))
    text, trained = whole_and_trained(store, 0)
    assert text == f"Q: {questions[0]}\nA: xxxxxxx<|im_end|>"
    assert [t.strip() for t in trained] == ["xxxxxxx<|im_end|>"]


def test_the_dft_trainers_lines_train_the_assistant_only(make: Make) -> None:
    store = make(DFT, name="data.jsonl")
    answers = [orjson.loads(line)["messages"][-1]["content"] for line in DFT.splitlines()]
    assert len(store) == 2
    for i, answer in enumerate(answers):
        assert whole_and_trained(store, i)[1] == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (ROLL, {}),
        (ROLL, {"prompt_key": "instruction", "response_key": "output"}),
    ],
)
def test_rolls_default_fields_need_no_flag(
    make: Make, record: dict[str, Any], fields: dict[str, str]
) -> None:
    text, trained = whole_and_trained(make(orjson.dumps(record).decode(), **fields), 0)
    assert text == "<|im_start|>user\nAdd<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert trained == ["3<|im_end|>"]


def test_rolls_four_keys_name_any_fields(make: Make) -> None:
    record = {"sys": "Be kind.", "ask": "Add", "more": "1 and 2", "reply": "3"}
    fields = {
        "system_key": "sys",
        "prompt_key": "ask",
        "query_key": "more",
        "response_key": "reply",
    }
    text, trained = whole_and_trained(make(orjson.dumps(record).decode(), **fields), 0)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nAdd\n1 and 2<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert trained == ["3<|im_end|>"]
