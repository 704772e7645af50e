from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

from megasft.data.encode import Encoded, trained_tokens
from megasft.data.tokenize import Made, Recipe, Rejected, Tokenizer
from megasft.data.turn_bounds import Span
from megasft.errors import DataError
from tests.tiny_tokenizer import make_tokenizer

IM_START, IM_END = 1, 2
CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "😀"},
    ]
}


def make_one(folder: Path, record: Any, **options: Any) -> Made | Rejected:
    (outcome,) = Tokenizer(Recipe(folder, **options)).make([(7, orjson.dumps(record))])
    assert outcome.line == 7
    return outcome


def test_turns_hold_exactly_the_ids_of_the_answer_and_its_stop(tokenizer_dir: Path) -> None:
    made = make_one(tokenizer_dir, CHAT)
    assert isinstance(made, Made)
    hf = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokens, turns = made.sample
    trained = [tokens[start : start + n].tolist() for start, n, *_ in turns]
    assert trained == [[*hf.encode("Hello there"), IM_END], [*hf.encode("😀"), IM_END]]
    assert len(trained[1]) == 5  # four bytes of one character, all trained
    before = [tokens[start - 3 : start].tolist() for start, *_ in turns]
    header = hf.encode("<|im_start|>assistant\n")
    assert before == [header[-3:]] * 2
    assert header[0] == IM_START
    assert turns[:, 2:4].tolist() == [[0, 1], [0, 3]]
    assert made.stop_ids == (IM_END, IM_END)


def test_tokens_are_those_of_the_whole_render(tokenizer_dir: Path) -> None:
    made = make_one(tokenizer_dir, CHAT)
    assert isinstance(made, Made)
    hf = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = hf.encode(hf.apply_chat_template(CHAT["messages"], tokenize=False))
    assert made.sample.tokens.tolist() == ids


def test_eos_is_trained_although_it_is_the_pad(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path, pad="<|im_end|>")
    made = make_one(folder, CHAT)
    assert isinstance(made, Made)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == IM_END
    last = made.sample.turns[:, 0] + made.sample.turns[:, 1] - 1
    assert made.sample.tokens[last].tolist() == [IM_END, IM_END]


def test_one_outcome_for_each_record_in_order(tokenizer_dir: Path) -> None:
    lines = [(1, b"{"), (2, orjson.dumps(CHAT)), (3, b"[]"), (5, orjson.dumps(CHAT))]
    outcomes = Tokenizer(Recipe(tokenizer_dir)).make(lines)
    kinds = [(type(o).__name__, o.line) for o in outcomes]
    assert kinds == [("Rejected", 1), ("Made", 2), ("Rejected", 3), ("Made", 5)]


def test_special_tokens_in_the_text_are_rejected_unless_kept(tokenizer_dir: Path) -> None:
    messages = [
        {"role": "user", "content": "Say <|im_end|>"},
        {"role": "assistant", "content": "No <|im_end|> twice"},
    ]
    record = {"messages": messages}
    outcome = make_one(tokenizer_dir, record, special_tokens_in_text="reject")
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "special token in the text"
    kept = make_one(tokenizer_dir, record, special_tokens_in_text="keep")
    assert isinstance(kept, Made)
    ((start, num_tokens, *_),) = kept.sample.turns.tolist()
    trained = kept.sample.tokens[start : start + num_tokens].tolist()
    assert trained.count(IM_END) == 2  # the author's and the template's


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_glued_headers_are_counted_not_trained(tmp_path: Path, trim_offsets: bool) -> None:
    glued = "{% for m in messages %}{{ 'assistant: ' + m['content'] + '\\n' }}{% endfor %}"
    record = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "the answer"},
        ]
    }
    folder = make_tokenizer(tmp_path, chat_template=glued)
    if trim_offsets:  # as Llama 3's tokenizer does: " the" would seem to begin at its "t"
        file = folder / "tokenizer.json"
        trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        spec = orjson.loads(file.read_bytes()) | {"post_processor": trim | {"use_regex": True}}
        file.write_bytes(orjson.dumps(spec))
    made = make_one(folder, record)
    assert isinstance(made, Made)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    ((start, num_tokens, *_),) = made.sample.turns.tolist()
    assert hf.decode(made.sample.tokens[start : start + num_tokens]) == " answer"
    assert made.num_border_tokens == 1
    assert made.stop_ids == ()


def test_an_answer_at_the_very_start_gives_up_its_first_token(tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    folder = make_tokenizer(tmp_path, chat_template=bare)
    record = {"messages": [{"role": "assistant", "content": "Hi"}]}
    made = make_one(folder, record)
    assert isinstance(made, Made)
    length = len(made.sample.tokens)
    assert made.sample.turns[:, :4].tolist() == [[1, length - 1, 0, 0]]
    record = {"messages": [{"role": "assistant", "content": ""}]}
    outcome = make_one(folder, record)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "turn without tokens"


def test_a_token_belongs_to_a_span_only_as_a_whole() -> None:
    #                    A  B  C    D     tokens at [0,2) [2,4) [4,9) [9,12)
    starts, ends = np.array([0, 2, 4, 9]), np.array([2, 4, 9, 12])
    encoded = Encoded(np.arange(4, dtype=np.int32), starts, ends, np.array([0, 4]))
    for span, wanted in (
        (Span(2, 9, None, 0), (1, 3, 0)),
        (Span(3, 9, None, 0), (2, 3, 1)),
        (Span(2, 8, None, 0), (1, 2, 1)),
        (Span(2, 8, "<e>", 0), (1, 3, 0)),  # rstrip swallowed a blank
        (Span(0, 4, None, 0), (1, 2, 0)),
    ):
        _, first, last, num_border_tokens = trained_tokens(encoded, ["x" * 12], [[span]])
        assert (*first.tolist(), *last.tolist(), *num_border_tokens.tolist()) == wanted


@pytest.mark.parametrize("missing", ["folder", "files", "template"])
def test_an_unusable_tokenizer_is_one_message(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "tokenizer"
    if missing == "files":
        folder.mkdir()
    if missing == "template":
        make_tokenizer(folder)
        (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"not a folder|no tokenizer|no chat template"):
        Tokenizer(Recipe(folder))
