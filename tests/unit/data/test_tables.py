"""Parquet, Arrow, `save_to_disk` and Zstandard, where the extra `data` is installed."""

import hashlib
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data.build import BuildOptions, build
from megasft.data.inputs import category_of, find_files
from megasft.data.read import open_sources, read_chunks
from megasft.data.tokenize import Recipe
from megasft.errors import DataError
from megasft.store import open_store

ROWS = [
    {"instruction": "Add", "output": "3", "tools": [{"name": "add", "unit": None}]},
    {"instruction": "Sub", "output": "1", "tools": [{"name": None, "unit": "m"}]},
] * 1500


def places(path: Path) -> list[tuple[str, Any]]:
    sources = open_sources(find_files([path]))
    found = [
        (sources[chunk.source].place(number), orjson.loads(data))
        for chunk in read_chunks(sources)
        for number, data in chunk.records
    ]
    for source in sources:
        assert source.num_bytes == source.path.stat().st_size
        assert source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    return found


def dataset(rows: list[dict[str, str]]) -> Any:
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    # A named fingerprint: made by `from_list`, it pickles half of pyarrow, which fails with some.
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows))
    return datasets.Dataset(table, fingerprint="a")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_rows_come_in_order_with_their_number_and_without_their_nulls(
    tmp_path: Path, name: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    path, table = tmp_path / name, pyarrow.Table.from_pylist(ROWS)
    if name == "a.parquet":
        parquet.write_table(table, path, row_group_size=700)
    elif name == "a.feather":
        feather.write_feather(table, str(path))
    else:
        with ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    found = places(path)
    assert [place for place, _ in found] == [f"{path}:record {n}" for n in range(1, 3001)]
    assert [row["tools"] for _, row in found[:2]] == [[{"name": "add"}], [{"unit": "m"}]]
    assert {row["instruction"] for _, row in found[::2]} == {"Add"}


def test_a_cut_off_table_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet:record 1: the table cannot be read"):
        places(path)


def test_a_folder_of_save_to_disk_is_its_own_shards_in_their_order(tmp_path: Path) -> None:
    saved = tmp_path / "chats"
    data = dataset([{"prompt": str(i), "answer": "x"} for i in range(10)])
    data.select(range(9, -1, -1), new_fingerprint="b").save_to_disk(saved, num_shards=3)
    (saved / "cache-1.arrow").write_bytes(b"left over")
    found = places(saved)
    assert [int(row["prompt"]) for _, row in found] == list(range(9, -1, -1))
    assert {category_of(file) for file in find_files([saved])} == {"chats"}
    assert find_files([tmp_path]) == find_files([saved])


def test_splits_are_not_joined_unasked(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = dataset([{"prompt": "Hi", "answer": "Yo"}])
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=r"holds 2 splits \(train, test\); name the ones"):
        find_files([tmp_path / "both"])
    assert len(places(tmp_path / "both" / "train")) == len(places(tmp_path / "one")) == 1


@pytest.mark.parametrize("num_frames", [1, 3])
def test_zstandard_is_read_whole_or_not_at_all(tmp_path: Path, num_frames: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    frame = b"".join(b'{"n":%d}\n' % i for i in range(40_000))
    packed = zstandard.ZstdCompressor().compress(frame)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed * num_frames)
    found = places(path)
    assert [row["n"] for _, row in found] == list(range(40_000)) * num_frames
    assert found[-1][0] == f"{path}:{40_000 * num_frames}"

    path.write_bytes(path.read_bytes()[: -len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst:\d+: the compressed data ends"):
        places(path)


@pytest.mark.slow
def test_a_store_of_a_table_is_the_same_for_any_workers_and_knows_its_records(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, output, stores = tmp_path / "a.parquet", tmp_path / "store", []
    rows = [{"prompt": f"{i}?", "answer": "x" * (i % 7 + 1)} for i in range(20_000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for num_workers in (1, 2):
        options = BuildOptions((path,), output, Recipe(tokenizer_dir), num_workers, overwrite=True)
        build(options, on_bytes=lambda n: None, on_rejected=lambda place, why: pytest.fail(why))
        stores.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert stores[0] == stores[1]
    assert open_store(output).source_line(19_999) == f"{path}:record 20000"


@pytest.mark.parametrize("kind", ["a text", "a list of texts", "a list of Arrow's JSON"])
def test_messages_in_json_columns_are_read_as_messages(
    tmp_path: Path, tokenizer_dir: Path, kind: str
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    texts = [orjson.dumps(message).decode() for message in messages]
    column = pyarrow.array([orjson.dumps(messages).decode()])
    if kind != "a text":
        column = pyarrow.array([texts], pyarrow.list_(pyarrow.string()))
    if "Arrow" in kind:
        column = column.cast(pyarrow.list_(pyarrow.json_()))
    parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "json.parquet")
    (tmp_path / "plain.jsonl").write_bytes(orjson.dumps({"messages": messages}))
    stores = []
    for name in ("json.parquet", "plain.jsonl"):
        output = tmp_path / f"{name}-store"
        options = BuildOptions((tmp_path / name,), output, Recipe(tokenizer_dir))
        build(options, on_bytes=lambda n: None, on_rejected=lambda p, m: None)
        stores.append(open_store(options.output).sample(0))
    assert [sample.tokens.tolist() for sample in stores[:1]] == [stores[1].tokens.tolist()]
    assert stores[0].turns.tolist() == stores[1].turns.tolist()
