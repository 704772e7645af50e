"""gigatoken beside the tokenizers library, and what a build does when the two differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
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

TEXT = st.text(max_size=40) | st.text(st.sampled_from("ab \n你😀é<|im_end|>"), max_size=40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return (folder / "tokenizer.json").read_text()


def encoders(source: str) -> tuple[GigatokenEncoder, HuggingFaceEncoder]:
    reference = HuggingFaceEncoder(Backend.from_str(source), "here")
    fast = make_encoder(source, reference, "auto")
    assert isinstance(fast, GigatokenEncoder)
    return fast, reference


@settings(max_examples=200, deadline=None)
@given(text=TEXT, data=st.data())
def test_ids_and_trained_tokens_are_those_of_the_tokenizers_library(
    source: str, text: str, data: st.DataObject
) -> None:
    fast, reference = encoders(source)
    (got,), (want,) = fast.encode([text]), reference.encode([text])
    assert got.ids.tolist() == want.ids.tolist()
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4)))
    spans = [Span(edges[0], edges[1], None, 0), Span(edges[2], edges[3], "<|im_end|>", 1)]
    for chosen in (spans, spans[1:]):
        left, right = trained_tokens(got, text, chosen), trained_tokens(want, text, chosen)
        # Tokens that are a part of a character: the library gives each the whole character.
        is_split = bool((np.diff(want.starts) == 0).any())
        if not is_split:
            assert [x.tolist() for x in left[:2]] == [x.tolist() for x in right[:2]]
            assert left.num_border_tokens == right.num_border_tokens


def test_a_text_that_a_normalizer_changes_is_left_to_the_library(source: str) -> None:
    with_nfc = json.dumps(json.loads(source) | {"normalizer": {"type": "NFC"}})
    fast, reference = encoders(with_nfc)
    text = "e\u0301 <|im_end|>"
    (got,), (want,) = fast.encode([text]), reference.encode([text])
    assert not got.in_bytes
    assert got.ids.tolist() == want.ids.tolist()
    assert next(iter(fast.encode(["plain"]))).in_bytes


class Wrong:
    """A gigatoken that encodes one word otherwise."""

    def __init__(self, right: Any) -> None:
        self._right, self.vocab = right, right.vocab

    def encode(self, data: bytes) -> Any:
        ids = self._right.encode(data)
        return ids[::-1] if b"zebra" in data else ids


def test_one_differing_id_is_found(source: str) -> None:
    import gigatoken

    reference = HuggingFaceEncoder(Backend.from_str(source), "here")
    wrong = GigatokenEncoder(Wrong(gigatoken.Tokenizer.from_json(source)), reference)
    with pytest.raises(UnfaithfulError, match="zebra"):
        list(wrong.encode(["Hello", "a zebra"]))


def test_other_tokenizers_are_left_to_the_library(source: str) -> None:
    reference = HuggingFaceEncoder(Backend.from_str(source), "here")
    assert make_encoder(source, reference, "tokenizers") is reference
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
    import orjson

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
