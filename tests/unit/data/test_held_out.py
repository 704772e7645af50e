"""A part of the conversations is held out by what they say, and both stores are made or neither."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner, Result

from megasft.cli.main import app
from megasft.data.formats import FieldMap, parse
from megasft.data.held_out import Part
from megasft.store import open_store

HALF = Part(0.5, held_out=True)


def chat(number: int, **more: Any) -> dict[str, Any]:
    question = {"role": "user", "content": f"How much is {number} and {number}?"}
    return {"messages": [question, {"role": "assistant", "content": f"{2 * number}"}], **more}


@pytest.fixture
def build(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    monkeypatch.setattr("megasft.cli.build._fitting_workers", lambda files: 0)  # in this process

    def run(given: Path, *flags: str) -> Result:
        command = ["build", "--input", given, "--tokenizer", tokenizer_dir]
        output = ["--output", tmp_path / "store", "--overwrite"]
        return CliRunner().invoke(app, [*map(str, (*command, *output)), *flags])

    return run


def lines_of(store: Path) -> set[int]:
    return {int(line) for line in open_store(store).lineage[:, 1]}


def write(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def test_each_conversation_is_in_one_of_two_stores_and_stays_there_when_data_grows(
    tmp_path: Path, build: Callable[..., Result]
) -> None:
    file = write(tmp_path / "chats.jsonl", *map(chat, range(200)))
    result = build(file, "--valid-fraction", "0.2")
    assert result.exit_code == 0, result.output
    train, valid = lines_of(tmp_path / "store"), lines_of(tmp_path / "store-valid")
    assert train | valid == set(range(1, 201))
    assert not train & valid
    assert 20 < len(valid) < 60
    grown = [*map(chat, range(200, 300)), *(chat(n, id=n) for n in range(200))]
    assert build(write(file, *grown), "--valid-fraction", "0.2").exit_code == 0
    assert {line + 100 for line in valid} == {
        line for line in lines_of(tmp_path / "store-valid") if line > 100
    }
    part = open_store(tmp_path / "store-valid").meta["recipe"]["part"]
    assert part == {"fraction": 0.2, "held_out": True}


def test_a_larger_share_holds_what_a_smaller_one_held() -> None:
    chats = [parse(orjson.dumps(chat(n)), FieldMap()) for n in range(300)]
    shares = [{n for n, c in enumerate(chats) if Part(f, True).holds(c)} for f in (0.1, 0.3, 0.9)]
    assert shares[0] < shares[1] < shares[2]
    assert 230 < len(shares[2]) < 300
    other = {n for n, c in enumerate(chats) if Part(0.3, held_out=False).holds(c)}
    assert other == set(range(300)) - shares[1]


def test_a_bad_record_is_told_once_and_leaves_neither_store(
    tmp_path: Path, build: Callable[..., Result]
) -> None:
    file = write(tmp_path / "chats.jsonl", *map(chat, range(50)), {"messages": []})
    result = build(file, "--valid-fraction", "0.5")
    assert result.exit_code == 1
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "store-valid").exists()
    result = build(file, "--valid-fraction", "0.5", "--skip-bad")
    assert result.exit_code == 0
    assert result.output.count("no assistant turn") == 2  # told, and counted
    counts = [open_store(tmp_path / name).meta["counts"] for name in ("store", "store-valid")]
    assert [c["rejected"] for c in counts] == [{"no assistant turn": 1}, {}]
    assert sum(c["conversations"] for c in counts) == 51


def test_a_folder_of_training_and_evaluation_files_becomes_two_stores(
    tmp_path: Path, build: Callable[..., Result]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_bytes(orjson.dumps([chat(n) for n in range(3)]))
    (folder / "eval.json").write_bytes(orjson.dumps([chat(n) for n in range(7, 9)]))
    assert build(folder).exit_code == 0
    assert lines_of(tmp_path / "store") == {1, 2, 3}
    assert lines_of(tmp_path / "store-valid") == {1, 2}
    assert build(folder, "--valid-fraction", "0.5").exit_code != 0
    (folder / "eval.json").rename(folder / "test.json")
    assert build(folder).exit_code == 1  # a test split validates nothing


def test_nothing_held_out_of_few_conversations_is_an_error_that_names_the_store(
    tmp_path: Path, build: Callable[..., Result]
) -> None:
    file = write(tmp_path / "chats.jsonl", chat(1))
    result = build(file, "--valid-fraction", "0.000001")
    assert result.exit_code == 1
    assert "store-valid (held out for validation): " in str(result.exception or result.output)
