import hashlib
import io
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.data import json_list, read
from megasft.data.conversation import MAX_RECORD_BYTES
from megasft.data.json_list import split_list
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
    assert places(path) == [(f"{path}:record 1", b'{"a": 1}'), (f"{path}:record 2", b"7")]


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


TEXT = st.text(alphabet='a"\\\\,[]{}: \n\u00e9\u2028')  # all that a cut could be confused by
JSON = st.recursive(
    # 64 bits: beyond them orjson reads a float, of a whole list as of an item.
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def in_blocks_of(num_bytes: int, data: bytes) -> list[bytes]:
    stream = io.BytesIO(data)
    return list(split_list(lambda asked: stream.read(min(asked, num_bytes)), "a.json"))


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans())
def test_a_list_is_cut_where_a_parser_would_cut_it(
    items: list[Any], indent: int | None, num_bytes: int, ascii_only: bool
) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode()
    found = in_blocks_of(num_bytes, b" \n" + data + b"\n ")
    assert [orjson.loads(record) for record in found] == items
    assert all(record == record.strip() for record in found)


def test_a_list_that_is_cut_off_anywhere_is_an_error() -> None:
    data = rb'[{"a": "]\\\""}, [1, {"b": [2]}], "c,", 7]'
    assert len(in_blocks_of(5, data)) == 4
    for num_bytes in range(1, len(data)):
        with pytest.raises(DataError, match=r"a\.json:1: not JSON: the list does not end"):
            in_blocks_of(5, data[:num_bytes])


@pytest.mark.parametrize(
    ("data", "line", "fault"),
    [
        (b"[1,\n,2]", 2, "a record is missing"),
        (b"[1,\n2,]", 2, "a record is missing"),
        (b"[,]", 1, "a record is missing"),
        (b"[1]\n[2]", 2, "something follows the end of the list"),
        (b'[1]\n {"a": 1}\n', 2, "something follows the end of the list"),
        (b'[1]\n\n"', 3, "something follows the end of the list"),
    ],
)
@pytest.mark.parametrize("num_bytes", [3, 100])
def test_what_is_no_list_is_named(data: bytes, line: int, fault: str, num_bytes: int) -> None:
    with pytest.raises(DataError, match=rf"a\.json:{line}: not JSON: {fault}"):
        in_blocks_of(num_bytes, data)


def test_of_a_record_that_is_too_long_only_so_much_is_kept() -> None:
    long = b'"' + b" " * (MAX_RECORD_BYTES + 1000) + b'"'
    found = in_blocks_of(json_list._BLOCK, b"[1, " + long + b", 2]")
    assert [len(record) for record in found] == [1, MAX_RECORD_BYTES + 1, 1]


PRETTY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}, indent=2)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (PRETTY.encode(), "pretty-printed"),
        (f"{PRETTY}\n{PRETTY}\n".encode(), "pretty-printed"),
        (json.dumps({"version": "1", "data": [{"text": "Hi"}]}, indent=1).encode(), r"jq -c '\."),
        (b"\xef\xbb\xbf" + PRETTY.encode(), "pretty-printed"),
        (PRETTY.replace("\n", "\r\n").encode(), "pretty-printed"),
        (b'{"text": "Hi"}\r{"text": "Yo"}\r', "carriage return"),
        ('{"text": "Hi"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "Hi"}\n'.encode("utf-16-le"), "-f UTF-16LE"),
        ('{"text": "Hi"}\n'.encode("utf-16-be"), "-f UTF-16BE"),
        ('[{"text": "Hi"}]'.encode("utf-16"), "UTF-16"),
        ('{"text": "Hi"}\n'.encode("utf-32"), "UTF-32"),
    ],
)
def test_a_file_that_is_no_lines_at_all_is_refused_once_with_its_cause(
    tmp_path: Path, data: bytes, cause: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=cause) as caught:
        places(path)
    assert str(caught.value).startswith(f"{path}:1: ")


def test_a_broken_first_line_of_a_good_file_is_left_to_its_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for first in (b'{"a": [1,', b'{"a": {', b"{", b'{"a": 1}\r'):
        path.write_bytes(first + b'\n{"a": 2}\n')
        assert [data for _, data in places(path)] == [first.strip(), b'{"a": 2}']
