import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from megasft.errors import StoreError
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, open_store, token_dtype

SAMPLES = [
    Sample(np.array([5, 6, 7], np.int32), turn_records([(1, 2, 0, 1)])),
    Sample(np.array([8], np.int32), turn_records([])),
    Sample(np.array([9, 3, 3, 9], np.int32), turn_records([(1, 1, 2, 0), (3, 1, 2, 2)])),
]
SOURCES = [{"path": "a.jsonl", "kind": "jsonl"}, {"path": "b.json", "kind": "json list"}]


def write(path: Path, *, vocab_size: int = 100, **options: Any) -> Path:
    with StoreWriter(path, vocab_size=vocab_size, **options) as writer:
        for i, sample in enumerate(SAMPLES):
            writer.add(sample, source=i % 2, line=10 + i)
        writer.finish({"sources": SOURCES})
    return path


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_499, 2), (65_500, 4)])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    store = open_store(write(tmp_path / "store", vocab_size=vocab_size))
    assert len(store) == 3
    for i, sample in enumerate(SAMPLES):
        assert store.sample(i).tokens.tolist() == sample.tokens.tolist()
        assert store.sample(i).turns.tolist() == sample.turns.tolist()
    assert (tmp_path / "store" / "tokens.bin").stat().st_size == 8 * itemsize
    assert token_dtype(vocab_size).itemsize == itemsize


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_several_samples_are_read_at_once_in_the_order_asked_for(
    tmp_path: Path, vocab_size: int
) -> None:
    store = open_store(write(tmp_path / "store", vocab_size=vocab_size))

    read = store.samples(np.array([2, 0, 1, 2]))

    assert [tokens.tolist() for tokens in read.tokens] == [
        *([9, 3, 3, 9], [5, 6, 7], [8], [9, 3, 3, 9]),
    ]
    assert read.turns[:, 0].tolist() == [1, 3, 1, 1, 3]
    assert read.num_turns.tolist() == [2, 1, 0, 2]
    none = store.samples(np.zeros(0, np.int64))
    assert (len(none.tokens), none.turns.shape, len(none.num_turns)) == (0, (0, 5), 0)


def test_an_empty_store_and_its_borders_are_read(tmp_path: Path) -> None:
    assert open_store(write(tmp_path / "store")).turns.offsets.tolist() == [0, 5, 5, 15]
    with StoreWriter(tmp_path / "empty", vocab_size=100) as writer:
        writer.finish({"sources": SOURCES})
    empty = open_store(tmp_path / "empty")
    assert len(empty) == 0
    assert empty.turns.offsets.tolist() == [0]


def test_a_sample_knows_where_it_came_from(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "store"))
    assert [store.source_line(i) for i in range(3)] == [
        "a.jsonl:10",
        "b.json:record 11",
        "a.jsonl:12",
    ]


def test_the_same_samples_give_the_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(file.name for file in first.iterdir())
    assert names == [
        "lineage.npy", "store.json", "tokens.bin", "tokens.idx", "turns.bin", "turns.idx",
    ]  # fmt: skip
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_the_fingerprint_sees_where_one_sample_ends(tmp_path: Path) -> None:
    prints = set()
    for name, lengths in (("a", (1, 2)), ("b", (2, 1))):
        with StoreWriter(tmp_path / name, vocab_size=100) as writer:
            for n in lengths:
                sample = Sample(np.zeros(n, np.int32), turn_records([]))
                writer.add(sample, source=0, line=1)
            writer.finish({"sources": SOURCES})
        prints.add(open_store(tmp_path / name).fingerprint)
    assert len(prints) == 2


def test_an_interrupted_build_is_refused_and_can_be_restarted(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt), StoreWriter(path, vocab_size=100) as writer:
        writer.add(SAMPLES[0], source=0, line=1)
        raise KeyboardInterrupt
    for broken in (path, tmp_path / "store.partial"):
        with pytest.raises(StoreError, match="half-written"):
            open_store(broken)
    with StoreWriter(path, vocab_size=100) as writer:
        assert writer.restarted
        writer.add(SAMPLES[0], source=0, line=1)
        writer.finish({"sources": SOURCES})
    assert len(open_store(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_store_is_replaced_only_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path / "store")
    with pytest.raises(StoreError, match="--overwrite"):
        write(path)
    write(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_two_builds_of_one_store_do_not_mix(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "store.partial.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another build is writing store right now"):
        write(tmp_path / "store")
    os.close(lock)
    write(tmp_path / "store")


def test_overwriting_replaces_nothing_but_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(StoreError, match="is not a token store; it is not replaced"):
        StoreWriter(tmp_path / "thesis", vocab_size=10, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]
    assert (tmp_path / "thesis" / "chapter1").exists()


DAMAGED = ["tokens.bin", "tokens.idx", "turns.bin", "turns.idx", "lineage.npy"]


@pytest.mark.parametrize("lost_bytes", [1, 40])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, lost_bytes: int) -> None:
    path = write(tmp_path / "store")
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-lost_bytes])
    with pytest.raises(StoreError, match=name.split(".")[0]):
        open_store(path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "store") / "store.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"format_version": 99}))
    with pytest.raises(StoreError, match="format version 99"):
        open_store(tmp_path / "store")


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a token store"):
        open_store(tmp_path)
