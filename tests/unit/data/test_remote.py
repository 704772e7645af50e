"""Inputs that are URLs. `memory://` stands for every object store; no network is needed."""

import gzip
import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data.build import BuildOptions, build
from megasft.data.inputs import category_of, find_files
from megasft.data.read import open_sources, read_chunks
from megasft.data.remote import Remote, is_url, without_secrets
from megasft.data.tokenize import Recipe
from megasft.errors import DataError
from megasft.store import open_store

fsspec = pytest.importorskip("fsspec")
CHAT = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yo"}]}\n'


@pytest.fixture
def bucket() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def records(*inputs: str) -> list[tuple[str, bytes]]:
    sources = open_sources(find_files(inputs))
    return [
        (sources[chunk.source].place(line), data.strip())
        for chunk in read_chunks(sources)
        for line, data in chunk.records
    ]


def fault(*inputs: str) -> str:
    with pytest.raises(DataError) as caught:
        records(*inputs)
    return str(caught.value)


def test_what_a_url_is() -> None:
    urls = ("s3://b/a.jsonl", "hf://datasets/a/b", "zip://*.jsonl::s3://b/a.zip", "memory://a")
    assert all(is_url(url) for url in urls)
    assert not any(is_url(path) for path in ("a.jsonl", "/data/a", "hub:openai/gsm8k", "C:/a"))


def test_a_file_is_streamed_and_its_size_and_hash_are_kept(bucket: Any) -> None:
    packed = gzip.compress(CHAT * 20_000, mtime=0)
    bucket.pipe("/bucket/a.jsonl.gz", packed)
    (file,) = files = find_files(["memory://bucket/a.jsonl.gz"])
    assert (str(file), file.name, category_of(file)) == (
        "memory://bucket/a.jsonl.gz",
        "a.jsonl.gz",
        "a",
    )
    assert find_files(files) == files
    (source,) = sources = open_sources(files)
    assert sum(len(chunk.records) for chunk in read_chunks(sources)) == 20_000
    assert source.as_meta() == {
        "path": "memory://bucket/a.jsonl.gz",
        "kind": "jsonl",
        "bytes": len(packed),
        "sha256": hashlib.sha256(packed).hexdigest(),
    }


def test_folders_and_globs_are_those_of_this_machine(bucket: Any) -> None:
    bucket.pipe("/bucket/b.jsonl", b'{"b":1}\n')
    bucket.pipe("/bucket/a/c.json", b'[{"c":1}]')
    bucket.pipe("/bucket/.hidden.jsonl", b'{"h":1}\n')
    bucket.pipe("/bucket/notes.txt", b"not data")
    in_folder = [
        ("memory:///bucket/a/c.json:record 1", b'{"c":1}'),
        ("memory:///bucket/b.jsonl:1", b'{"b":1}'),
    ]
    assert records("memory://bucket") == records("memory://bucket/") == in_folder
    assert records("memory:///bucket/b.jsonl", "memory://bucket/a/*") == in_folder[::-1]
    assert "memory://bucket/*.gz matches no file (0 of it)" in fault("memory://bucket/*.gz")
    assert "memory://bucket/none.jsonl is not there" in fault("memory://bucket/none.jsonl")


def test_several_splits_in_a_bucket_are_not_joined_unasked(bucket: Any) -> None:
    bucket.pipe("/bucket/train.jsonl", b"{}\n")
    bucket.pipe("/bucket/eval.jsonl", b"{}\n")
    assert "--input memory://bucket/train.jsonl" in fault("memory://bucket")
    bucket.pipe("/bucket/saved/dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert "memory://bucket/saved holds 2 splits (train, test)" in fault("memory://bucket/saved")


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow"])
def test_tables_are_read_in_place(bucket: Any, tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table, path = pyarrow.Table.from_pylist([{"n": i} for i in range(3000)]), tmp_path / "t"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=700)
    elif kind == "feather":
        feather.write_feather(table, str(path))
    else:
        with ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    bucket.pipe("/bucket/t", path.read_bytes())
    (source,) = sources = open_sources(find_files(["memory://bucket/t"]))
    found = [orjson.loads(data)["n"] for c in read_chunks(sources) for _, data in c.records]
    assert found == list(range(3000))
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.num_bytes, source.place(7)) == (
        path.stat().st_size,
        "memory://bucket/t:record 7",
    )


def test_a_store_is_the_same_from_a_url_but_for_the_name(
    tmp_path: Path, bucket: Any, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(CHAT * 50)
    bucket.pipe("/bucket/a.jsonl", CHAT * 50)
    stores = []
    for name in (str(path), f"file://{path}", "memory://bucket/a.jsonl"):
        files = tuple(find_files([name]))
        asked = BuildOptions(files, tmp_path / "store", Recipe(tokenizer_dir), overwrite=True)
        build(asked, on_bytes=lambda n: None, on_rejected=lambda place, why: pytest.fail(why))
        assert open_store(tmp_path / "store").source_line(49) == f"{name}:50"
        written = {file.name: file.read_bytes() for file in (tmp_path / "store").iterdir()}
        meta = written.pop("store.json").replace(name.encode(), b"NAME")
        stores.append((written, meta))
    assert stores[0] == stores[1] == stores[2]


def test_an_archive_is_read_without_being_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"a":1}\n')
        archive.writestr("b.jsonl", '{"b":1}\n')
    inner = f"file://{tmp_path}/x.zip"
    both = [(f"zip://{n}.jsonl::{inner}:1", b'{"%c":1}' % ord(n)) for n in "ab"]
    assert records(f"zip://*.jsonl::{inner}") == both
    assert records(f"zip://b.jsonl::{inner}") == both[1:]


def test_a_driver_that_is_not_installed_is_named_with_its_package() -> None:
    for url, package in {"s3://b/a": "s3fs", "gs://b/a": "gcsfs", "abfs://b/a": "adlfs"}.items():
        try:
            __import__(package)
        except ImportError:
            said = fault(url)
            assert said.startswith(f"{url} needs a driver for {url.partition(':')[0]}:// that is")
            assert f"pip install {package}" in said
    assert "foo://b/a cannot be opened: Protocol not known: foo" in fault("foo://b/a")


def test_fsspec_itself_may_be_missing() -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from megasft.data.inputs import find_files\n"
        "find_files(['s3://b/a.jsonl'])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the Python package fsspec, which opens it, is not installed" in seen.stderr
    assert "pip install 'megasft[data]'" in seen.stderr


class Breaking:
    """A driver's file that fails, or ends, in the middle."""

    def __init__(self, error: Exception | None) -> None:
        self.left, self.error = 3, error

    def read(self, size: int) -> bytes:
        self.left -= 1
        if self.left > 0:
            return CHAT
        if self.error:
            raise self.error
        return b""

    def close(self) -> None:
        pass


class BreakingStore:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def open(self, path: str, mode: str) -> Breaking:
        return Breaking(self.error)


def test_a_connection_that_breaks_is_named_and_not_taken_for_the_end() -> None:
    class DriverError(Exception):
        pass

    failing = BreakingStore(DriverError("at https://host/a?signature=secret"))
    for store, said in (
        (failing, r"s3://b/a cannot be read: DriverError: at https://host/a\?\.\.\.; check"),
        (BreakingStore(None), r"s3://b/a broke off after 164 of 1,000 bytes; build again"),
    ):
        with pytest.raises(DataError, match=said):
            list(read_chunks(open_sources([Remote("s3://b/a", "b/a", store, 1000)])))


def test_passwords_and_signatures_are_not_shown() -> None:
    assert without_secrets("https://me:secret@host/a.jsonl?key=1#x") == "https://host/a.jsonl?..."
    assert without_secrets("s3://me:secret@bucket/a.jsonl") == "s3://bucket/a.jsonl"
    assert without_secrets("hf://datasets/a/b@v1/c.jsonl") == "hf://datasets/a/b@v1/c.jsonl"


def test_a_file_on_a_web_server_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    class Silent(SimpleHTTPRequestHandler):  # serves no ranges
        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "a.jsonl").write_bytes(b'{"n":1}\n' * 100_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a.jsonl"
        found = records(f"{url}?key=1")
        assert (len(found), found[-1][0]) == (100_000, f"{url}?...:100000")
        assert "none.jsonl is not there" in fault(url.replace("a.jsonl", "none.jsonl"))
    finally:
        server.shutdown()
        server.server_close()
