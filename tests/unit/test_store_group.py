"""Several token stores read as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasft.errors import StoreError
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store
from megasft.store_group import open_stores, population_of


def write(
    path: Path,
    categories: list[list[int]],
    names: dict[str, str],
    *,
    vocab_size: int = 100,
    tokenizer: dict[str, str] | None = None,
    files: tuple[str, ...] = ("a.jsonl",),
) -> Path:
    """Write a sample per list, with a turn of each category; its tokens say which sample it is."""
    with StoreWriter(path, vocab_size=vocab_size) as writer:
        for i, turns in enumerate(categories):
            tokens = np.full(2 + 2 * len(turns), i + 1, np.int32)
            records = [(1 + 2 * n, 1, category, n) for n, category in enumerate(turns)]
            sample = Sample(tokens, turn_records(records))
            writer.add(sample, source=i % len(files), line=10 + i)
        meta: dict[str, Any] = {
            "tokenizer": {"sha256": "t", "chat_template_sha256": "c"} | (tokenizer or {}),
            "special_tokens": {"pad": 0, "end_of_turn": [len(names)]},
            "categories": names,
            "counts": {"samples": len(categories), "rejected": {"too long": 1, path.name: 2}},
            "sources": [{"path": file} for file in files],
        }
        writer.finish(meta)
    return path


@pytest.fixture
def both(tmp_path: Path) -> TokenStore:
    first = write(tmp_path / "one", [[1], [], [2, 2]], {"1": "maths", "2": "code"})
    second = write(
        tmp_path / "two",
        [[1], [2], [3], [4, 0]],
        {"1": "code", "2": "chat", "3": "maths", "4": "law"},
        files=("b.jsonl", "c.jsonl"),
    )
    return open_stores([first, second])


def test_samples_are_numbered_through_and_stay_what_they_are(
    both: TokenStore, tmp_path: Path
) -> None:
    alone = [open_store(tmp_path / name) for name in ("one", "two")]
    expected = [store.sample(i) for store in alone for i in range(len(store))]
    assert len(both) == len(expected) == 7
    for i, sample in enumerate(expected):
        assert both.sample(i).tokens.tolist() == sample.tokens.tolist()
        kept = both.sample(i).turns[:, [0, 1, 3]].tolist()
        assert kept == sample.turns[:, [0, 1, 3]].tolist()
        assert both.tokens.lengths[i] == len(sample.tokens)
    places = [both.source_line(i) for i in range(7)]
    assert places[:3] == ["a.jsonl:10", "a.jsonl:11", "a.jsonl:12"]
    assert places[3:] == ["b.jsonl:10", "c.jsonl:11", "b.jsonl:12", "c.jsonl:13"]
    with pytest.raises(IndexError):
        both.sample(7)


def test_categories_are_one_by_name(both: TokenStore) -> None:
    """Code and maths take the ids they have, law keeps its own, chat's is taken."""
    assert both.meta["categories"] == {"1": "maths", "2": "code", "4": "law", "5": "chat"}
    turns = [both.sample(i).turns[:, 2].tolist() for i in range(7)]
    assert turns == [[1], [], [2, 2], [2], [5], [1], [4, 0]]


def test_a_category_that_lost_its_id_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "one", [[1]], {"1": "maths"})
    second = write(tmp_path / "two", [[1]], {"1": "code"})
    assert open_stores([first, second]).meta["warnings"] == [
        f"category 1 (code) of {second} is 2 here; name it by its name in a mixture"
    ]


def test_counts_add_up_and_sources_know_their_store(both: TokenStore, tmp_path: Path) -> None:
    assert both.meta["counts"] == {"samples": 7, "rejected": {"too long": 2, "one": 2, "two": 2}}
    assert [source["store"] for source in both.meta["sources"]] == [
        *[str(tmp_path / "one")],
        *[str(tmp_path / "two")] * 2,
    ]
    assert both.meta["special_tokens"] == {"pad": 0, "end_of_turn": [2, 4]}
    assert both.name == f"{tmp_path / 'one'} + {tmp_path / 'two'}"
    assert both.path == tmp_path / "one"


def test_the_fingerprint_is_that_of_all_stores_in_their_order(
    both: TokenStore, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prints = {
        both.fingerprint,
        open_stores([two, one]).fingerprint,
        open_stores([one]).fingerprint,
        open_stores([two]).fingerprint,
    }
    assert len(prints) == 4
    assert open_stores([one]).fingerprint == open_store(one).fingerprint
    assert open_stores([one, two]).fingerprint == both.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 101}, r"one and .*two differ in vocabulary size \(100 and 101\)"),
        ({"tokenizer": {"sha256": "u"}}, r"one and .*two differ in tokenizer \(t and u\)"),
    ],
)
def test_stores_of_different_tokenizers_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = write(tmp_path / "one", [[1]], {"1": "maths"})
    second = write(tmp_path / "two", [[1]], {"1": "maths"}, **changes)
    with pytest.raises(StoreError, match=message):
        open_stores([first, second])


def test_another_chat_template_is_a_warning(tmp_path: Path) -> None:
    first = write(tmp_path / "one", [[1]], {"1": "maths"})
    template = {"chat_template_sha256": "d"}
    second = write(tmp_path / "two", [[1]], {"1": "maths"}, tokenizer=template)
    (warning,) = open_stores([first, second]).meta["warnings"]
    assert "different chat templates" in warning


def test_a_store_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "one", [[1]], {"1": "maths"})
    with pytest.raises(StoreError, match="one is named twice"):
        open_stores([path, path / ".." / "one"])


def test_the_population_knows_source_and_first_category_of_each_sample(
    both: TokenStore, tmp_path: Path
) -> None:
    found = population_of(both)
    assert found.category_of.tolist() == [1, 0, 2, 2, 5, 1, 4]
    assert found.source_of.tolist() == [0, 0, 0, 1, 2, 1, 2]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert found.sources == [("a.jsonl", one), ("b.jsonl", two), ("c.jsonl", two)]
    assert found.categories == {1: "maths", 2: "code", 4: "law", 5: "chat"}
    alone = population_of(open_store(tmp_path / "one"))
    assert alone.sources == [("a.jsonl", one)]
