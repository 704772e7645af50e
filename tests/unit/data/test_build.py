import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data import read, workers
from megasft.data.build import BuildOptions, Tally, build
from megasft.data.formats import FieldMap
from megasft.data.tokenize import Recipe
from megasft.errors import DataError, StoreError
from megasft.store import open_store

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the checkout")


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def run(*inputs: Path, output: Path, tokenizer: Path, **options: Any) -> tuple[Tally, list[str]]:
    complaints: list[str] = []
    recipe = Recipe(tokenizer, options.pop("fields", FieldMap()))
    tally = build(
        BuildOptions(inputs, output, recipe, **options),
        on_bytes=lambda num_bytes: None,
        on_rejected=lambda place, message: complaints.append(f"{place}: {message}"),
    )
    return tally, complaints


def store_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_store_holds_what_was_counted(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    first = write_jsonl(
        chat("Hi", "Hello", meta={"category_name": "chat"}),
        chat("1+1?", "2", meta={"category_id": 5, "category_name": "maths"}),
        name="a.jsonl",
    )
    second = write_jsonl(b"", chat("Bye", "See you"), name="b.jsonl")
    run(first, second, output=tmp_path / "store", tokenizer=tokenizer_dir)
    store = open_store(tmp_path / "store")
    assert [store.source_line(i) for i in range(3)] == [f"{first}:1", f"{first}:2", f"{second}:2"]
    assert [store.sample(i).turns[:, 2].tolist() for i in range(3)] == [[1], [5], [0]]
    assert store.meta["categories"] == {"1": "chat", "5": "maths"}
    assert store.meta["special_tokens"] == {"bos": None, "eos": 2, "pad": 0, "end_of_turn": [2]}
    assert store.meta["counts"] == {
        "conversations": 3,
        "samples": 3,
        "turns": 3,
        "tokens": sum(len(store.sample(i).tokens) for i in range(3)),
        "label_tokens": sum(int(store.sample(i).turns[:, 1].sum()) for i in range(3)),
        "turns_without_stop": 0,
        "border_tokens": 0,
        "stripped_turns": 0,
        "truncated": 0,
        "dropped": 0,
        "lost_tokens": 0,
        "lost_label_tokens": 0,
        "rejected": {},
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "store"]


def test_a_bad_record_prevents_the_store_and_is_listed(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(chat("Hi", "Hello"), b"{", chat("Hi", "Hello", labels=[1]), b"{")
    with pytest.raises(DataError, match=r"3 of 4 records are bad \(1 x bad labels; 2 x not JSON\)"):
        run(path, output=tmp_path / "store", tokenizer=tokenizer_dir)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store.partial").exists()
    listed = (tmp_path / "store.rejected.jsonl").read_bytes().splitlines()
    entries = [orjson.loads(line) for line in listed]
    assert [(e["file"], e["line"], e["reason"]) for e in entries] == [
        (str(path), 2, "not JSON"),
        (str(path), 3, "bad labels"),
        (str(path), 4, "not JSON"),
    ]


def test_skip_bad_makes_the_store_and_counts(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    meta = {"meta": {"category_id": 1, "category_name": "a"}}
    clash = {"meta": {"category_id": 1, "category_name": "b"}}
    path = write_jsonl(b"{", chat("Hi", "Hello", **meta), chat("Hi", "Hello", **clash))
    _, complaints = run(path, output=tmp_path / "store", tokenizer=tokenizer_dir, skip_bad=True)
    store = open_store(tmp_path / "store")
    assert store.meta["counts"]["rejected"] == {"bad category": 1, "not JSON": 1}
    assert [store.source_line(i) for i in range(len(store))] == [f"{path}:2"]
    assert [c.split(": ")[:2] for c in complaints] == [
        [f"{path}:1", "not JSON"],
        [f"{path}:3", "bad category"],
    ]


def test_no_sample_left_is_an_error_even_when_skipping(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="no sample is left"):
        run(write_jsonl(b"{"), output=tmp_path / "s", tokenizer=tokenizer_dir, skip_bad=True)


def test_the_list_of_an_earlier_build_does_not_stay(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    with pytest.raises(DataError):
        run(write_jsonl(b"{"), output=tmp_path / "store", tokenizer=tokenizer_dir)
    assert (tmp_path / "store.rejected.jsonl").exists()
    run(write_jsonl(chat("Hi", "Hello")), output=tmp_path / "store", tokenizer=tokenizer_dir)
    assert not (tmp_path / "store.rejected.jsonl").exists()


def test_a_store_that_is_there_is_kept_unless_overwritten(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    where = {"output": tmp_path / "store", "tokenizer": tokenizer_dir}
    run(write_jsonl(chat("Hi", "Hello")), **where)
    again = write_jsonl(chat("Hi", "Hello"), chat("Bye", "See you"))
    with pytest.raises(StoreError, match="exists already"):
        run(again, **where)
    assert len(open_store(tmp_path / "store")) == 1
    run(again, **where, overwrite=True)
    assert len(open_store(tmp_path / "store")) == 2


@pytest.mark.slow
def test_the_bytes_of_a_store_do_not_depend_on_the_number_of_workers(
    tmp_path: Path,
    tokenizer_dir: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 2000)
    names = ["chat", "maths", "code", None]
    records = [
        b"{" if i % 50 == 7 else chat(f"{i}?", "a" * (i % 13), meta={"category_name": names[i % 4]})
        for i in range(300)
    ]
    path = write_jsonl(*records)
    stores, complaints = [], []
    for num_workers in (0, 2):
        output = tmp_path / str(num_workers) / "store"
        _, bad = run(
            path, output=output, tokenizer=tokenizer_dir, num_workers=num_workers, skip_bad=True
        )
        stores.append(store_bytes(output))
        complaints.append(bad)
    assert stores[0] == stores[1]
    assert complaints[0] == complaints[1]
    assert len(complaints[0]) == 6
    assert path.stat().st_size > 3 * 2000 * 2  # several chunks for each worker


@pytest.mark.slow
def test_workers_are_replaced_after_their_share_of_bytes(
    tmp_path: Path,
    tokenizer_dir: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(workers, "RETIRED_AFTER", 8000)
    started = []
    start = workers.Workers._start
    monkeypatch.setattr(workers.Workers, "_start", lambda self: started.append(1) or start(self))
    path = write_jsonl(*(chat(f"{i}?", "a" * (i % 13)) for i in range(300)))
    run(path, output=tmp_path / "store", tokenizer=tokenizer_dir, num_workers=2)
    run(path, output=tmp_path / "one", tokenizer=tokenizer_dir)
    assert len(started) > 2
    assert store_bytes(tmp_path / "store") == store_bytes(tmp_path / "one")


class Kills:
    """Ends the process that asks it about a conversation."""

    def holds(self, conversation: Any) -> bool:
        os._exit(3)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_build_and_an_error_in_one_is_a_bad_record(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    file, complaints = write_jsonl(chat("Hi", "Hello")), []
    for recipe, message in (
        (Recipe(tokenizer_dir, part=Kills()), "worker process died with code 3"),  # type: ignore[arg-type]
        (Recipe(tokenizer_dir, FieldMap(format="no such format")), "1 x failed"),
    ):
        options = BuildOptions((file,), tmp_path / "s", recipe, 2, overwrite=True)
        with pytest.raises(DataError, match=message):
            build(
                options, on_bytes=lambda n: None, on_rejected=lambda *told: complaints.append(told)
            )
    assert [place for place, _ in complaints] == [f"{file}:1"]


@needs_data
def test_gsm8k_builds_with_a_field_mapping(tmp_path: Path, tokenizer_dir: Path) -> None:
    fields = FieldMap(prompt_key="question", response_key="answer")
    file = DATA / "gsm8k" / "train.jsonl"
    run(file, output=tmp_path / "store", tokenizer=tokenizer_dir, fields=fields)
    store = open_store(tmp_path / "store")
    assert len(store) == 7473
    assert store.source_line(7472) == f"{file}:7473"


@needs_data
def test_a_sharegpt_list_builds_as_it_is(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = DATA / "sharegpt" / "dummy_conversation.json"
    run(file, output=tmp_path / "store", tokenizer=tokenizer_dir)
    store = open_store(tmp_path / "store")
    assert (len(store), store.meta["counts"]["turns"]) == (500, 1000)
    assert store.source_line(499) == f"{file}:record 500"
