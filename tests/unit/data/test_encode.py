"""gigatoken beside the tokenizers library, and what a build does when the two differ."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gigatoken
import numpy as np
import orjson
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from megasft.data.conversation import UnfaithfulError
from megasft.data.encode import (
    GigatokenEncoder,
    HuggingFaceEncoder,
    make_encoder,
    trained_tokens,
)
from megasft.data.tokenize import Made, Recipe, Tokenizer
from megasft.data.tokenizer_folder import load_tokenizer
from megasft.data.turn_bounds import Span
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.data.wrong_gigatoken import Wrong

TEXT = st.text(max_size=40) | st.text(st.sampled_from("ab \n你😀é<|im_end|>"), max_size=40)


@cache
def source() -> str:
    with TemporaryDirectory() as folder:
        return (make_tokenizer(Path(folder)) / "tokenizer.json").read_text()


@cache
def encoders(normalizer: str = "") -> tuple[GigatokenEncoder, HuggingFaceEncoder]:
    tokenizer = json.loads(source()) | ({"normalizer": {"type": normalizer}} if normalizer else {})
    reference = HuggingFaceEncoder(Backend.from_str(json.dumps(tokenizer)), "here")
    fast = make_encoder(json.dumps(tokenizer), reference, "auto")
    assert isinstance(fast, GigatokenEncoder)
    return fast, reference


def spans_of(text: str, data: st.DataObject) -> list[Span]:
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4)))
    both = [Span(edges[0], edges[1], None, 0), Span(edges[2], edges[3], "<|im_end|>", 1)]
    return both[data.draw(st.integers(0, 2)) :]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, max_size=4), data=st.data())
def test_ids_and_trained_tokens_are_those_of_the_tokenizers_library(
    texts: list[str], data: st.DataObject
) -> None:
    fast, reference = encoders()
    got, want = fast.encode(texts), reference.encode(texts)
    assert got.ids.tolist() == want.ids.tolist()
    assert got.borders.tolist() == want.borders.tolist()
    assert got.borders[-1] == len(got.ids)
    spans = [spans_of(text, data) for text in texts]
    left, right = (trained_tokens(encoded, texts, spans) for encoded in (got, want))
    assert left.text.tolist() == [i for i, own in enumerate(spans) for _ in own]
    # Of tokens that are parts of a character, the library gives each the whole character.
    if not (np.diff(want.starts) == 0).any():
        for ours, theirs in zip(left, right, strict=True):
            assert ours.tolist() == theirs.tolist()


def test_each_text_of_several_is_looked_up_as_if_it_were_alone() -> None:
    texts = ["你好 <|im_end|>", "", "e\u0301te", "Hello world"]
    spans = [[Span(0, 2, None, 0)], [], [Span(1, 4, None, 2), Span(4, 4, None, 3)], []]
    for normalizer in ("", "NFC"):
        for encoder in encoders(normalizer):
            whole = trained_tokens(encoder.encode(texts), texts, spans)
            alone = [
                trained_tokens(encoder.encode([t]), [t], [s])
                for t, s in zip(texts, spans, strict=True)
            ]
            assert whole.first.tolist() == [i for part in alone for i in part.first.tolist()]
            assert whole.last.tolist() == [i for part in alone for i in part.last.tolist()]
            borders = [n for part in alone for n in part.num_border_tokens.tolist()]
            assert whole.num_border_tokens.tolist() == borders


def test_a_text_that_a_normalizer_changes_is_left_to_the_library() -> None:
    fast, reference = encoders("NFC")
    texts = ["plain", "e\u0301 <|im_end|>", "plain, too"]
    got, want = fast.encode(texts), reference.encode(texts)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_one_differing_id_is_found() -> None:
    reference = encoders()[1]
    wrong = GigatokenEncoder(Wrong(gigatoken.Tokenizer.from_json(source())), reference)
    with pytest.raises(UnfaithfulError, match="zebra"):
        wrong.encode(["Hello", "a zebra"])


def test_other_tokenizers_are_left_to_the_library() -> None:
    reference = encoders()[1]
    assert make_encoder(source(), reference, "tokenizers") is reference
    assert make_encoder('{"model": {"type": "Unigram"}}', reference, "auto") is reference
    assert make_encoder('{"model": {"type": "BPE"}} "ByteLevel"', reference, "auto") is reference


CHAT = {
    "messages": [
        {"role": "user", "content": "What is <s> in <|im_end|>?"},
        {"role": "assistant", "content": "A token, such as </s>. 是的 😀"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "  You are welcome"},
    ]
}
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-2-like SentencePiece BPE with byte fallback, saved as transformers saves it."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    words = "what is in a token such as you are welcome thanks yes no maybe hello world inst"
    text.write_text(f"{words}\n{words.title()}\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    hf = LlamaTokenizer.from_pretrained(folder)
    hf.chat_template = INST
    hf.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("policy", ["escape", "keep"])
def test_sentencepiece_models_train_whole_answers(sentencepiece_dir: Path, policy: str) -> None:
    recipe = Recipe(sentencepiece_dir, special_tokens_in_text=policy)
    (made,) = Tokenizer(recipe).make([(1, orjson.dumps(CHAT))])
    assert isinstance(made, Made)
    hf = load_tokenizer(sentencepiece_dir)
    tokens, turns = made.sample
    answers = [tokens[start : start + n].tolist() for start, n, *_ in turns]
    assert [hf.decode(a).strip() for a in answers] == [
        "A token, such as </s>. 是的 😀</s>",
        "You are welcome</s>",
    ]
    num_controls = [a.count(hf.eos_token_id) for a in answers]
    assert num_controls == ([1, 1] if policy == "escape" else [2, 1])
    assert tokens.tolist().count(hf.bos_token_id) == (1 if policy == "escape" else 2)
    if policy == "keep":
        render = hf.apply_chat_template(CHAT["messages"], tokenize=False)
        assert tokens.tolist() == hf.encode(render, add_special_tokens=False)
