"""What the flags of a build do to its store, and how a build falls back on the references."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data.build import BuildOptions, Tally, build
from megasft.data.formats import FieldMap
from megasft.data.render import RenderOptions
from megasft.data.tokenize import Recipe
from megasft.data.too_long import Limit
from megasft.errors import DataError
from megasft.schema import TURN_FIELDS
from megasft.store import TokenStore, open_store
from tests.tiny_tokenizer import CHATML, make_tokenizer
from tests.unit.data.wrong_gigatoken import Wrong

NUM_TOKENS, CATEGORY = TURN_FIELDS.index("num_tokens"), TURN_FIELDS.index("category_id")


def turns_of(*answers: str, **fields: Any) -> dict[str, Any]:
    messages = []
    for number, answer in enumerate(answers):
        messages += [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages, **fields}


@pytest.fixture
def make(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> Callable[..., tuple[Tally, TokenStore]]:
    def made(*records: Any, **options: Any) -> tuple[Tally, TokenStore]:
        build_options = {k: options.pop(k) for k in ("num_workers",) if k in options}
        recipe = Recipe(options.pop("tokenizer", tokenizer_dir), **options)
        output = tmp_path / "store"
        tally = build(
            BuildOptions((write_jsonl(*records),), output, recipe, overwrite=True, **build_options),
            on_bytes=lambda num_bytes: None,
            on_rejected=lambda place, message: None,
        )
        return tally, open_store(output)

    return made


Make = Callable[..., tuple[Tally, TokenStore]]


def test_too_long_conversations_are_cut_behind_a_turn_and_counted(
    make: Make, tmp_path: Path
) -> None:
    records = [turns_of("Short"), turns_of("First", "word " * 40), turns_of("word " * 60)]
    whole, uncut = make(*records)
    lengths = uncut.tokens.lengths.tolist()
    tally, store = make(*records, limit=Limit(30))
    assert tally.truncated == 1
    assert tally.dropped == 1
    assert len(store) == 2
    first_turn = uncut.sample(1).turns[0]
    size = int(first_turn[0] + first_turn[NUM_TOKENS])
    assert store.tokens.lengths.tolist() == [lengths[0], size]
    assert tally.lost_tokens == sum(lengths) - int(store.tokens.lengths.sum())
    assert tally.lost_labels == whole.label_tokens - tally.label_tokens
    assert store.meta["counts"]["lost_tokens"] == tally.lost_tokens
    limit = {"max_tokens": 30, "policy": "truncate-turns"}
    assert store.meta["recipe"]["limit"] == limit | {"max_prompt_tokens": 0, "max_answer_tokens": 0}
    (entry,) = map(orjson.loads, (tmp_path / "store.rejected.jsonl").read_bytes().splitlines())
    assert entry["line"] == 3
    assert entry["reason"] == "dropped: too long"


def test_too_long_conversations_can_be_errors(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 x too long"):
        make(turns_of("Short"), turns_of("word " * 60), limit=Limit(30, "error"))
    assert not (tmp_path / "store").exists()
    tally, store = make(turns_of("word " * 60), limit=Limit(30, "truncate"))
    assert store.tokens.lengths.tolist() == [30]
    assert tally.turns_without_stop == 1  # its end was cut off, and that is counted


def test_everything_is_one_turn_over_all_tokens_but_the_first(make: Make) -> None:
    only_user = {"messages": [{"role": "user", "content": "Hi"}]}
    tally, store = make(turns_of("One", "Two"), only_user, fields=FieldMap(train_on="everything"))
    for index in range(2):
        tokens, turns = store.sample(index)
        assert turns[:, :2].tolist() == [[1, len(tokens) - 1]]
    assert tally.label_tokens == tally.tokens - 2


def test_a_given_chat_template_replaces_the_tokenizers(make: Make, tmp_path: Path) -> None:
    shouting = CHATML.replace("'\\n' + message['content']", "'!\\n' + message['content']")
    bare = make_tokenizer(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    _, own = make(turns_of("One"))
    _, given = make(turns_of("One"), chat_template=shouting, tokenizer=bare)
    assert given.meta["tokenizer"]["chat_template"] == shouting
    facts = [store.meta["tokenizer"]["chat_template_sha256"] for store in (own, given)]
    assert facts[0] != facts[1]
    assert len(given.sample(0).tokens) > len(own.sample(0).tokens)


def test_messages_may_have_categories_of_their_own(make: Make) -> None:
    record = turns_of("One", "Two", "Three", meta={"category_name": "rest"})
    record["categories"] = [None, "maths", None, {"category_id": 7}, None, None]
    _, store = make(record)
    names = store.meta["categories"]
    found = [names[str(number)] for number in store.sample(0).turns[:, CATEGORY]]
    assert found == ["maths", "7", "rest"]
    with pytest.raises(DataError, match="1 x bad category"):
        make(record | {"categories": ["maths"]})


DECIDES_BY_LENGTH = CHATML.replace(
    "message['content'] +",
    "(message['content'] if message['content'] | length < 60 else 'too long') +",
)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_template_no_shape_can_tell_makes_the_build_begin_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    folder = make_tokenizer(tmp_path / "by_length", chat_template=DECIDES_BY_LENGTH)
    records = [turns_of("Hello") for _ in range(520)]
    records[512]["messages"][0]["content"] = "A question of sixty and more characters " * 2
    with caplog.at_level(logging.WARNING):
        _, store = make(*records, tokenizer=folder, num_workers=num_workers)
    assert "the build begins again and compares every render" in caplog.text
    checked = RenderOptions(check_all=True)
    _, wanted = make(*records, tokenizer=folder, rendering=checked)
    assert store.fingerprint == wanted.fingerprint
    assert len(store.sample(512).tokens) != len(store.sample(511).tokens)


def test_a_wrong_gigatoken_makes_the_build_begin_again_without_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import gigatoken

    records = [turns_of("Hello"), turns_of("zebra")]
    _, wanted = make(*records, encoder="tokenizers")

    right = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda source: Wrong(right(source)))
    with caplog.at_level(logging.WARNING):
        _, store = make(*records)
    assert "the build begins again without gigatoken" in caplog.text
    assert store.fingerprint == wanted.fingerprint
