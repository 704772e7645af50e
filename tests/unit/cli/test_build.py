import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megasft.errors import StoreError
from megasft.store import open_store

from .conftest import Seen

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'
REPOSITORY = Path(__file__).resolve().parents[3]
Megasft = Callable[..., Seen]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ('{"document": "Hi"}', "missing field"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn"),
        (GOOD.replace('"user"', '"narrator"'), "unknown role"),
    ],
)
def test_a_bad_line_ends_in_its_place_and_a_count(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft, line: str, reason: str
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    arguments = ("build", "--input", path, "--tokenizer", tokenizer_dir, "--output")
    seen = megasft(*arguments, tmp_path / "store")
    assert seen.code == 1
    assert f"{path}:2: {reason}" in seen.err
    assert f"error: 1 of 3 records are bad (1 x {reason})" in seen.err
    assert "Traceback" not in seen.err
    assert not (tmp_path / "store").exists()

    seen = megasft(*arguments, tmp_path / "store", "--skip-bad")
    assert seen.code == 0
    assert f"{path}:2: {reason}" in seen.err
    assert f"rejected 1 x {reason}" in seen.out
    assert open_store(tmp_path / "store").meta["counts"]["rejected"] == {reason: 1}


def test_build_inspect_and_trace_show_weights_where_there_are_some(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    def shown(name: str, *lines: str) -> list[str]:
        path, store = tmp_path / f"{name}.jsonl", tmp_path / name
        path.write_text("\n".join(lines))
        built = megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", store)
        seen = [built, megasft("inspect", store), megasft("trace", store, "--sample", 0)]
        assert [one.code for one in seen] == [0, 0, 0]
        return [one.out for one in seen]

    built, inspected, traced = shown("some", GOOD.replace('"Yo"', '"Yo", "weight": 0.25'), GOOD)
    line = "1 turns have a weight other than 1; weights go from 0.25 to 1"
    assert f"  {line}\n" in built and f"  weights     {line}\n" in inspected
    assert "message 1, weight 0.25\n" in traced
    assert not [out for out in shown("none", GOOD, GOOD) if "weight" in out]


def test_an_empty_file_ends_in_its_name_and_a_count(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    good, empty = tmp_path / "good.jsonl", tmp_path / "empty.jsonl"
    good.write_text(GOOD)
    empty.touch()
    seen = megasft("build", "-i", good, empty, "--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    assert seen.code == 1
    assert f"error: {empty}:1: the file is empty (0 conversations)" in seen.err
    assert not (tmp_path / "s").exists()


def test_many_bad_lines_are_not_all_printed_but_all_counted(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("{\n" * 30)
    seen = megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    assert f"{path}:20: not JSON" in seen.err
    assert f"{path}:21:" not in seen.err
    assert "30 of 30 records are bad (30 x not JSON)" in seen.err
    assert len((tmp_path / "s.rejected.jsonl").read_text().splitlines()) == 30


def test_input_takes_several_files_at_once(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with the worker that a user gets
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path in paths:
        path.write_text(GOOD)
    seen = megasft("build", "--input", *paths, "--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    assert seen.code == 0
    assert "3 samples, 3 turns" in seen.out
    store = open_store(tmp_path / "s")
    assert [store.source_line(i) for i in range(3)] == [f"{path}:1" for path in paths]


def test_a_flag_without_effect_is_refused(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    arguments = ("--tokenizer", tokenizer_dir, "--format", "messages", "--prompt-key", "question")
    seen = megasft("build", "-i", tmp_path / "a.jsonl", "-o", tmp_path / "s", *arguments)
    assert seen.code == 1
    assert "no effect with --format messages" in seen.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "sharegpt", "--query-key", "input"), "no effect with --format sharegpt"),
        (("--category", "a", "--category-from-file"), "name the same thing; drop one"),
    ],
)
def test_flags_that_fight_are_refused(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft, flags: tuple[str, ...], message: str
) -> None:
    arguments = ("--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    seen = megasft("build", "-i", tmp_path / "a.jsonl", *arguments, *flags)
    assert seen.code == 1
    assert message in seen.err


def test_a_folder_with_named_fields_last_turns_and_a_category_field_builds(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    (tmp_path / "in").mkdir()
    turns = GOOD.removeprefix('{"messages": [').removesuffix("]}")
    two_turns = f'{{"messages": [{turns}, {turns}], "kind": "chat"}}\n'
    (tmp_path / "in" / "a.jsonl").write_text(two_turns)
    (tmp_path / "in" / "b.json").write_text('[{"ask": "Hi", "reply": "Yo", "kind": "pair"}]')
    flags = ("--prompt-key", "ask", "--response-key", "reply", "--category-key", "kind")
    arguments = ("--tokenizer", tokenizer_dir, "--train-on", "last-turn", *flags)
    seen = megasft("build", "-i", tmp_path / "in", *arguments, "-o", tmp_path / "s")
    assert seen.code == 0
    store = open_store(tmp_path / "s")
    assert [store.sample(i).turns[:, 2:4].tolist() for i in range(2)] == [[[1, 3]], [[2, 1]]]
    assert store.meta["categories"] == {"1": "chat", "2": "pair"}


def test_help_teaches_with_an_example_and_says_what_happens_to_bad_records(
    megasft: Megasft,
) -> None:
    assert "megasft build --input chats.jsonl" in megasft("--help").out
    text = megasft("build", "--help").out
    assert "megasft build --input chats.jsonl" in text
    assert "no store is made and the exit code is 1" in " ".join(text.split())


@contextmanager
def running_build(path: Path, tokenizer: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "megasft.cli.main", "build", "--input", path, "--workers", "2"]
    process = subprocess.Popen(
        [*map(str, command), "--tokenizer", str(tokenizer), "--output", str(output)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_build_leaves_no_store_and_no_workers_and_can_be_restarted(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    path, store = tmp_path / "chats.jsonl", tmp_path / "store"
    partial = tmp_path / "store.partial"
    path.write_text(f"{GOOD}\n" * 10_000)
    with running_build(path, tokenizer_dir, store) as process:
        children: list[psutil.Process] = []

        def started() -> bool:
            children[:] = psutil.Process(process.pid).children()
            return partial.exists() and len(children) == 2

        wait_for(started)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial.exists()
    with pytest.raises(StoreError, match="half-written"):
        open_store(store)
    seen = megasft("inspect", store)
    assert seen.code == 1
    assert "half-written" in seen.err
    wait_for(lambda: not any(is_alive(child) for child in children))

    seen = megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", store)
    assert seen.code == 0
    assert len(open_store(store)) == 10_000
    assert not partial.exists()
    undisturbed = tmp_path / "undisturbed"
    arguments = ("build", "-i", path, "--tokenizer", tokenizer_dir, "--workers", 2)
    assert megasft(*arguments, "-o", undisturbed).code == 0
    for file in undisturbed.iterdir():
        assert file.read_bytes() == (store / file.name).read_bytes(), file.name


def test_arguments_of_the_template_and_masks_are_flags_and_kept_in_the_store(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(GOOD.replace('"content": "Yo"', '"content": "<think>\\nHm\\n</think>\\n\\nYo"'))
    arguments = ("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    for wrong in ("{", "[1]", '{"messages": []}'):
        seen = megasft(*arguments, "--template-kwargs", wrong)
        assert seen.code != 0
        assert "--template-kwargs" in seen.err
    seen = megasft(*arguments, "--mask-thinking", "--train-on", "everything")
    assert seen.code != 0
    assert "no effect" in seen.err
    flags = ("--template-kwargs", '{"level": 3}', "--mask-thinking", "--mask-tool-calls")
    assert megasft(*arguments, *flags).code == 0
    store = open_store(tmp_path / "s")
    assert store.meta["recipe"]["fields"]["template_kwargs"] == '{"level": 3}'
    assert store.meta["recipe"]["mask_thinking"]
    assert store.meta["recipe"]["mask_tool_calls"]
    assert int(store.sample(0).turns[0, 1]) == 3  # "Yo" and the end of the turn
    seen = megasft("lint", tmp_path / "s")
    assert seen.code == 0, seen.out


def test_keys_that_nobody_reads_are_printed_once(
    tmp_path: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n" + GOOD.replace('{"messages"', '{"score": 1, "messages"') + "\n")
    seen = megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", tmp_path / "s")
    line = f"not read: `score` of a record: in 1 record, first at {path}:2"
    assert seen.out.count("not read") == seen.out.count(line) == 1
    shown = megasft("inspect", tmp_path / "s").out  # wrapped to the width of the terminal
    assert "".join(line.removeprefix("not read: ").split()) in "".join(shown.split())
