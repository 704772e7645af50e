"""Datasets by name, resolved by `datasets` from folders of this machine: no network is needed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megasft.data.hub import DatasetName, parse_name, title_of_dataset
from megasft.data.inputs import category_of, find_files
from megasft.data.read import open_sources, read_chunks
from megasft.errors import DataError


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    lines = [b'{"prompt":"%d?","answer":"%d"}\n' % (i, i) for i in range(100)]
    (folder / "train-0.jsonl").write_bytes(b"".join(lines[:60]))
    (folder / "train-1.jsonl").write_bytes(b"".join(lines[60:]))
    (folder / "test.jsonl").write_bytes(b'{"prompt":"left out","answer":"x"}\n')
    return folder


def fault(*inputs: str) -> str:
    with pytest.raises(DataError) as caught:
        find_files(inputs)
    return str(caught.value)


def test_a_name_has_up_to_four_parts() -> None:
    assert parse_name("hub:openai/gsm8k") == DatasetName("openai/gsm8k", None, None, None)
    assert parse_name("hub:squad[train]") == DatasetName("squad", None, "train", None)
    assert parse_name("hub:openai/gsm8k/main[train]@refs/pr/1") == DatasetName(
        "openai/gsm8k", "main", "train", "refs/pr/1"
    )
    assert parse_name("hub:./a/b/c/d[test]") == DatasetName("./a/b/c/d", None, "test", None)


@pytest.mark.parametrize(
    "name",
    [
        "hub:",
        "hub:a/b/c/d",
        "hub:a//b",
        "hub:a/b[]",
        "hub:a/b[train[:10%]]",
        "hub:a/b[train+test]",
        "hub:a/b@v1[train]",
        "hub:./a[train]@v1",
    ],
)
def test_what_is_no_name_is_answered_with_the_syntax(name: str) -> None:
    said = fault(name)
    assert said.startswith(f"{name} is not the name of a dataset; write hub:OWNER/NAME[SPLIT]")


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(datasets: Any) -> None:
    assert "none is no folder of this machine" in fault("hub:./none[train]")


def test_a_split_is_read_like_any_table_under_its_own_name(datasets: Any, chats: Path) -> None:
    name = f"hub:{chats}[train]"
    (file,) = files = find_files([name])
    sources = open_sources(files)
    found = [
        (sources[chunk.source].place(number), orjson.loads(data))
        for chunk in read_chunks(sources)
        for number, data in chunk.records
    ]
    assert [place for place, _ in found] == [f"{name}:record {n}" for n in range(1, 101)]
    assert [row["prompt"] for _, row in found] == [f"{n}?" for n in range(100)]
    assert sources[0].as_meta()["path"] == name
    assert sources[0].num_bytes == file.num_bytes > 0  # type: ignore[union-attr]
    assert category_of(file) == "chats"


def test_of_several_splits_none_is_chosen_unasked(datasets: Any, chats: Path) -> None:
    remedy = f"choose one, such as --input 'hub:{chats}[train]'"
    several = f"hub:{chats} names no split, and the dataset has 2 (train, test); {remedy}"
    assert fault(f"hub:{chats}") == several
    assert f"[dev] has no split dev, and the dataset has 2 (train, test); {remedy}" in fault(
        f"hub:{chats}[dev]"
    )
    for file in chats.glob("train*"):
        file.unlink()
    assert str(find_files([f"hub:{chats}"])[0]) == f"hub:{chats}[test]"


def test_a_store_keeps_the_commit_and_every_shard(
    datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [tmp_path / f"gsm8k-train-0000{n}-of-00002.arrow" for n in range(2)]
    for shard in shards:
        shard.write_bytes(b"ARRO")
    asked: list[Any] = []

    def load_dataset_builder(path: str, name: str, *, revision: str) -> Any:
        asked.append((path, name, revision))
        return SimpleNamespace(
            hash="e53f048",
            info=SimpleNamespace(splits={"train": 0, "test": 0}),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: SimpleNamespace(
                cache_files=[{"filename": str(shard)} for shard in shards]
            ),
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    files = find_files(["hub:openai/gsm8k/main[train]@main"])
    assert asked == [("openai/gsm8k", "main", "main")]
    assert [str(file) for file in files] == [
        f"hub:openai/gsm8k/main[train]@e53f048/{shard.name}" for shard in shards
    ]
    assert {category_of(file) for file in files} == {"gsm8k"}
    assert title_of_dataset("hub:squad[train]@e53f048") == "squad"


def test_a_machine_without_the_hub_is_told_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "from megasft.data.inputs import find_files\n"
        "try: find_files(['hub:openai/gsm8k/main[train]'])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert seen.stdout.startswith("DataError hub:openai/gsm8k/main[train] cannot be loaded: ")
    assert "HF_HUB_OFFLINE is set: unset it, or fill the cache" in seen.stdout


def test_a_missing_package_is_named_with_its_remedy() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from megasft.data.inputs import find_files\n"
        "find_files(['hub:openai/gsm8k'])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the Python package datasets is not installed" in seen.stderr
    assert "pip install 'megasft[data]'" in seen.stderr
