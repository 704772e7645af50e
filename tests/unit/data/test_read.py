import hashlib
from pathlib import Path

import pytest

from megasft.data import read
from megasft.data.read import open_sources, read_chunks
from megasft.errors import DataError


def places(path: Path) -> list[tuple[str, bytes]]:
    (source,) = sources = open_sources([path])
    return [
        (source.place(line), data.strip())
        for chunk in read_chunks(sources)
        for line, data in chunk.records
    ]


def test_lines_keep_their_numbers_over_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n\n  \n{"a":2}')
    assert places(path) == [(f"{path}:1", b'{"a":1}'), (f"{path}:4", b'{"a":2}')]


def test_a_json_list_counts_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b' \n[\n {"a": 1},\n 7]')
    assert places(path) == [(f"{path}:record 1", b'{"a":1}'), (f"{path}:record 2", b"7")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_chunks_cover_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 40)
    lines = [b'{"number":%d}' % i for i in range(50)]
    data = b"\n".join(lines) if name == "a.jsonl" else b"[" + b",".join(lines) + b"]"
    (tmp_path / name).write_bytes(data)
    (source,) = sources = open_sources([tmp_path / name])
    chunks = list(read_chunks(sources))
    assert len(chunks) > 5
    records = [record for chunk in chunks for record in chunk.records]
    assert [(n, d.strip()) for n, d in records] == list(enumerate(lines, start=1))
    assert sum(chunk.num_bytes for chunk in chunks) == source.num_bytes == len(data)
    assert source.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ":1: the file is empty"),
        (b"\n \n", ":1: the file holds no record"),
        (b"[]", ":1: the file holds no record"),
        (b'[\n{"a": 1},\n{"a": ]', ":3: not JSON"),
    ],
)
def test_a_file_without_records_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_chunks(open_sources([path])))
    assert f"{path}{message}" in str(caught.value)
    assert "0 conversations" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl is not a file"):
        open_sources([tmp_path / "none.jsonl"])
