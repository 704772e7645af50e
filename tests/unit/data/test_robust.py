"""Whatever is wrong with an input or a disk: a clear error or a counted record, never a traceback.

Cut and damaged archives, a line of 50 MB, missing packages and unreadable files are in
test_inputs.py; connections that break, in test_remote.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megasft.cli.main import main
from megasft.data.build import BuildOptions, build
from megasft.data.inputs import find_files
from megasft.data.read import open_sources, read_chunks
from megasft.data.tokenize import Recipe
from megasft.errors import DataError
from megasft.store import open_store
from tests.full_disk import files_end_at

REPOSITORY = Path(__file__).resolve().parents[3]
GOOD = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yo"}]}'
BAD = {
    b'{"messages":[{"role":"user","content":"H\xff"},{"role":"assistant","content":"Yo"}]}': (
        "not JSON",
        "is not UTF-8 (0xff)",
    ),
    GOOD[:-20]: ("not JSON", ""),
    b"null": ("not an object", ""),
    b"[" + GOOD + b"]": ("not an object", "list"),
    b'{"messages":null}': ("missing field", "messages"),
    GOOD.replace(b'"Yo"', b"null"): ("missing field", "message 1 (assistant) has no `content`"),
    GOOD.replace(b'"Yo"', b"7"): ("wrong type", "content"),
    GOOD.replace(b'"Yo"', b'[["Yo"]]'): ("wrong type", "content"),
    GOOD.replace(b'{"role":"user","content":"Hi"}', b"[[]]"): (
        "wrong type",
        "message 0 is not an object",
    ),
    GOOD.replace(b'"user"', b"null"): ("unknown role", "None"),
    b"[" * 100_000: ("not JSON", ""),
    b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}": ("wrong type", "message 0 is not an object"),
}
"""Lines that cannot become a sample: the reason each is counted under, and a word of its detail."""


def run(tmp_path: Path, tokenizer: Path, *inputs: Path) -> list[str]:
    complaints: list[str] = []
    build(
        BuildOptions(inputs, tmp_path / "store", Recipe(tokenizer), skip_bad=True),
        on_bytes=lambda n: None,
        on_rejected=lambda place, why: complaints.append(f"{place}: {why}"),
    )
    return complaints


def test_each_bad_line_is_counted_by_reason_and_named_and_the_good_ones_stay(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(*[line for bad in BAD for line in (bad, GOOD)])
    complaints = run(tmp_path, tokenizer_dir, path)
    places = [f"{path}:{2 * n + 1}" for n in range(len(BAD))]
    for complaint, place, (reason, word) in zip(complaints, places, BAD.values(), strict=True):
        assert complaint.startswith(f"{place}: {reason}: ")
        assert word in complaint
    store = open_store(tmp_path / "store")
    assert [store.source_line(i) for i in range(len(store))] == [
        f"{path}:{2 * n + 2}" for n in range(len(BAD))
    ]
    counted = store.meta["counts"]["rejected"]
    assert sum(counted.values()) == len(BAD)
    assert set(counted) == {reason for reason, _ in BAD.values()}


def test_the_same_records_in_a_list_are_counted_the_same(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",".join([GOOD, b"null", b"[[1]]", b'{"messages":null}']) + b"]")
    reasons = ["not an object", "not an object", "missing field"]
    assert [c.split(": ")[1] for c in run(tmp_path, tokenizer_dir, path)] == reasons


def test_a_null_or_nested_column_of_a_table_is_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = orjson.loads(GOOD)["messages"]
    columns = {"null": [good, None], "nested": [[good], [good]]}
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"messages": column}), path)
    complaints = run(tmp_path, tokenizer_dir, *(tmp_path / f"{n}.parquet" for n in columns))
    assert [c.partition(": ")[2].partition(": ")[0] for c in complaints] == [
        "missing field",
        "wrong type",
        "wrong type",
    ]
    assert complaints[0].startswith(f"{tmp_path}/null.parquet:record 2: ")


def test_a_folder_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert find_files([tmp_path]) == [tmp_path / "b.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl holds no data file \(0 conversations\)"):
        find_files([tmp_path / "a.jsonl"])
    with pytest.raises(DataError, match=r"a\.jsonl is not a file"):
        open_sources([tmp_path / "a.jsonl"])


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is not a file"):
        list(read_chunks(open_sources(find_files([tmp_path / "a.jsonl"]))))


@pytest.mark.parametrize("num_bytes", [2_000, 40_000])
def test_a_full_disk_is_named_and_leaves_no_store(
    tmp_path: Path, tokenizer_dir: Path, num_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes((GOOD + b"\n") * 4000)
    arguments = ["build", "-i", tmp_path / "a.jsonl", "--tokenizer", tokenizer_dir]
    with files_end_at(num_bytes), pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "-o", str(tmp_path / "store")])
    err = capsys.readouterr().err
    assert ended.value.code == 1, err
    full = rf"{tmp_path}/store\.partial cannot be written: File too large, after [\d,]+ samples"
    assert re.search(full, err), err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
