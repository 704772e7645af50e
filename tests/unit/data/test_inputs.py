"""Files, folders and globs in; damaged ones end in a sentence. No data package is needed here."""

import gzip
import hashlib
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from megasft.data.build import BuildOptions, build
from megasft.data.conversation import MAX_RECORD_BYTES
from megasft.data.inputs import category_of, find_files
from megasft.data.read import Source, open_sources, read_chunks
from megasft.data.tokenize import Recipe
from megasft.errors import DataError
from megasft.store import open_store

CHAT = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yo"}]}\n'
ALPACA = b'{"instruction":"Add","input":"1 and 2","output":"3"}\n'
SHAREGPT = b'[{"conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Yo"}]}]'


def options(*inputs: Path, output: Path, tokenizer: Path, **more: object) -> BuildOptions:
    return BuildOptions(inputs, output, Recipe(tokenizer), **more)  # type: ignore[arg-type]


def run(asked: BuildOptions) -> list[str]:
    complaints: list[str] = []
    build(
        asked,
        on_bytes=lambda n: None,
        on_rejected=lambda place, why: complaints.append(f"{place}: {why}"),
    )
    return complaints


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_chunks(open_sources(find_files([path]))))
    return str(caught.value)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(CHAT * 3)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(ALPACA * 2, mtime=0))
    (folder / "deep" / "c.json").write_bytes(SHAREGPT)
    (folder / "notes.txt").write_text("not data")
    (folder / ".hidden.jsonl").write_bytes(CHAT)
    return folder


def test_a_folder_of_different_formats_builds_in_sorted_order(
    tmp_path: Path, mixed: Path, tokenizer_dir: Path
) -> None:
    assert run(options(mixed, output=tmp_path / "store", tokenizer=tokenizer_dir)) == []
    store = open_store(tmp_path / "store")
    files = [mixed / "a.jsonl.gz", mixed / "b.jsonl", mixed / "deep" / "c.json"]
    assert [store.source_line(i) for i in range(len(store))] == [
        *(f"{files[0]}:{n}" for n in (1, 2)),
        *(f"{files[1]}:{n}" for n in (1, 2, 3)),
        f"{files[2]}:record 1",
    ]
    for source, file in zip(store.meta["sources"], files, strict=True):
        on_disk = file.read_bytes()
        assert source["bytes"] == len(on_disk)
        assert source["sha256"] == hashlib.sha256(on_disk).hexdigest()


@pytest.mark.slow
def test_the_store_of_a_folder_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, mixed: Path, tokenizer_dir: Path
) -> None:
    stores = []
    for num_workers in (1, 2):
        output = tmp_path / "store"
        more = {"num_workers": num_workers, "overwrite": True, "category_from_file": True}
        run(options(mixed, output=output, tokenizer=tokenizer_dir, **more))
        stores.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert stores[0] == stores[1]


def test_files_are_sorted_as_paths_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = [tmp_path / "a" / "b.jsonl", tmp_path / "a.jsonl", tmp_path / "a-b.jsonl"]
    for file in files:
        file.write_bytes(CHAT)
    assert find_files([tmp_path]) == sorted(files) != sorted(files, key=str)


def test_a_glob_is_sorted_and_a_missing_path_is_left_to_the_reader(mixed: Path) -> None:
    assert find_files([mixed / "*.jsonl*"]) == [mixed / "a.jsonl.gz", mixed / "b.jsonl"]
    assert find_files([mixed / "b.jsonl", mixed / "none.jsonl"])[1] == mixed / "none.jsonl"


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    assert "*.jsonl matches no file" in fault(tmp_path / "*.jsonl")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert "holds no data file (0 conversations)" in fault(tmp_path)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.json", "eval.json"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "validation/a.jsonl"),
        ("maths_train.jsonl.gz", "maths.dev.jsonl"),
    ],
)
def test_splits_by_the_names_of_files_are_not_joined_unasked(
    tmp_path: Path, train: str, held_out: str
) -> None:
    for name in (train, held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CHAT)
    said = fault(tmp_path)
    assert f"several splits: 1 of training, such as {train}, and 1 held out" in said
    assert said.endswith(f"--input {tmp_path / train}")
    assert find_files([tmp_path / train, tmp_path / held_out]) == [
        tmp_path / train,
        tmp_path / held_out,
    ]
    assert len(find_files([tmp_path / "**" / "*.j*"])) == 2  # a pattern that matches is a choice


def test_one_split_alone_is_taken_and_words_within_words_are_none(tmp_path: Path) -> None:
    for name in ("contest.jsonl", "training.jsonl", "latest.jsonl", "trainer_devices.jsonl"):
        (tmp_path / name).write_bytes(CHAT)
    assert len(find_files([tmp_path])) == 4
    (tmp_path / "training.jsonl").rename(tmp_path / "test.jsonl")
    assert len(find_files([tmp_path])) == 4


def test_categories_come_from_the_file_unless_the_record_names_one(
    tmp_path: Path, mixed: Path, tokenizer_dir: Path
) -> None:
    own = CHAT.replace(b'{"messages"', b'{"meta":{"category_name":"own"},"messages"')
    (mixed / "b.jsonl").write_bytes(CHAT + own)
    more = {"category_from_file": True}
    run(options(mixed, output=tmp_path / "store", tokenizer=tokenizer_dir, **more))
    assert open_store(tmp_path / "store").meta["categories"] == {
        "1": "a",
        "2": "b",
        "3": "own",
        "4": "c",
    }


def test_a_constant_category_is_given_to_all(
    tmp_path: Path, mixed: Path, tokenizer_dir: Path
) -> None:
    run(options(mixed, output=tmp_path / "s", tokenizer=tokenizer_dir, category="chat"))
    store = open_store(tmp_path / "s")
    assert store.meta["categories"] == {"1": "chat"}
    assert all((store.sample(i).turns[:, 2] == 1).all() for i in range(len(store)))


def test_the_category_of_a_file_is_its_name_without_what_it_ends_in() -> None:
    names = [category_of(Path(n)) for n in ("x/a.jsonl.gz", "v1.2.parquet", "chats", "b.dat")]
    assert names == ["a", "v1.2", "chats", "b"]


def test_a_cut_off_gzip_names_the_line_and_leaves_no_store(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(b"".join(b'{"n":%d}\n' % i for i in range(20_000)))
    path.write_bytes(packed[: len(packed) // 2])
    text = zlib.decompressobj(wbits=31).decompress(path.read_bytes())
    num_lines = text.count(b"\n")
    assert num_lines > 1000
    cut = rf"{path}:{num_lines + 1}: the compressed data ends in the middle of it"
    with pytest.raises(DataError, match=cut):
        run(options(path, output=tmp_path / "store", tokenizer=tokenizer_dir))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl.gz"]


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(CHAT)[:10] + b"\xff" * 40)
    assert f"{path} is damaged" in fault(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(CHAT)
    path.chmod(0)
    assert f"{path} cannot be read: Permission denied" in fault(path)


def test_a_file_whose_bytes_cannot_be_read_is_named() -> None:
    # Opens, says it is a file, and fails to read, as a file on a broken disk does.
    broken = Source(Path("/proc/self/mem"))
    with pytest.raises(DataError, match="/proc/self/mem cannot be read: Input/output error"):
        list(read_chunks([broken]))


def test_a_line_of_50_mb_is_one_counted_record_and_memory_stays_flat(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(CHAT + CHAT.replace(b"Hi", b"x" * 50_000_000) + CHAT)
    asked = options(path, output=tmp_path / "s", tokenizer=tokenizer_dir, skip_bad=True)
    (complaint,) = run(asked)
    assert complaint.startswith(f"{path}:2: record too long")
    store = open_store(tmp_path / "s")
    assert store.meta["counts"]["rejected"] == {"record too long": 1}
    assert [store.source_line(i) for i in range(2)] == [f"{path}:1", f"{path}:3"]
    assert store.meta["sources"][0]["bytes"] == path.stat().st_size
    kept = [d for c in read_chunks(open_sources([path])) for _, d in c.records]
    assert max(map(len, kept)) == MAX_RECORD_BYTES + 1


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", CHAT), ("a.json", SHAREGPT)):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + data)
        ((_, record),) = next(read_chunks(open_sources([path]))).records
        assert record.startswith(b"{")


@pytest.mark.parametrize(
    ("magic", "package"), [(b"PAR1", "pyarrow"), (b"\x28\xb5\x2f\xfd", "zstandard")]
)
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, magic: bytes, package: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(magic + b"....")
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path; from megasft.data.read import open_sources\n"
        f"open_sources([Path({str(path)!r})])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"the Python package {package} is not installed" in seen.stderr
    assert "pip install 'megasft[data]'" in seen.stderr
