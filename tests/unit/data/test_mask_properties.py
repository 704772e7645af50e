"""What holds for any text: same ids as transformers, turns in order, each the answer and its stop.

Hypothesis writes the conversations here, out of characters that tokenizers and templates trip over.
"""

from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.unit.data.families import FAMILIES, Family, Record, is_trained, texts_of
from tests.unit.data.mask_oracle import (
    Built,
    build_samples,
    expected_sample,
    load_hf,
    make_family_tokenizer,
    wants_training,
)

MAX_EXAMPLES: Final = 60
# Blanks that strip() knows and Jinja's trim does, line ends, composing and joining characters,
# control characters, template and special-token syntax, one to four bytes of UTF-8.
NASTY: Final = (
    *"ab7 \n\r\t\x00\x1c\x85\xa0\u2028\u3000\u200b\u200d\u0301\u0338\ufe0f\ufeff\ufffd",
    *"<|>[]{}%#\\\"'/_▁Ġ｜é你好가ａ😀👩🏽🇫",
    "{{", "{%", "<think>", "im_end", "user", "assistant", "\n\n", " A: ",
)  # fmt: skip
TEXTS: Final = st.lists(st.sampled_from(NASTY), max_size=9).map("".join)


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Record:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    labels = draw(st.lists(st.integers(0, 1), min_size=len(messages), max_size=len(messages)))
    record = {"messages": messages, "labels": labels}
    written = "\0".join(message["content"] for message in messages)
    assume(not any(token in written for token in family.special))
    return record


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("properties")
    return {name: make_family_tokenizer(name, parent / name) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=MAX_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_text_becomes_the_ids_of_transformers_and_whole_answers(
    name: str, folders: dict[str, Path], data: st.DataObject
) -> None:
    family, hf = FAMILIES[name], load_hf(folders[name])
    records = data.draw(st.lists(conversations(family), min_size=1, max_size=3))
    for record, got in zip(records, build_samples(records, folders[name]), strict=True):
        if not wants_training(record):
            assert got.reason == "nothing to train"
            continue
        assert not got.reason, (got.reason, record)
        ids = hf.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
        assert got.tokens == ids
        assert_turns(got, record, family, hf)


def assert_turns(got: Built, record: Record, family: Family, hf: Any) -> None:
    wanted = [i for i in range(len(record["messages"])) if is_trained(record, i)]
    assert [message for _, _, message in got.turns] == wanted
    expected = expected_sample(record, family, hf, escapes=True)
    assert sum(num_tokens for _, num_tokens, _ in got.turns) == sum(expected.mask)
    behind = 1
    for start, num_tokens, message in got.turns:
        assert behind <= start
        assert num_tokens > 0
        behind = start + num_tokens
        pieces = [p for p in family.oracle(record, False) if p.turn == message]
        answer = hf.decode(got.tokens[start:behind])
        if expected.num_border_tokens:  # the first characters may belong to a token of the header
            assert answer.endswith(pieces[-1].text)
        else:
            assert answer == as_decoded(texts_of(pieces), hf)
    assert behind <= len(got.tokens)


def as_decoded(text: str, hf: Any) -> str:
    """Return a text as its tokens give it back: composed, or with blanks for SentencePiece's."""
    normalizer = hf.backend_tokenizer.normalizer
    if normalizer is None:
        return text
    normal = str(normalizer.normalize_str(text))
    return normal.replace("▁", " ") if normalizer.normalize_str(" ") == "▁" else normal
