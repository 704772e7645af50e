from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import typer
from typer.testing import CliRunner, Result

from megasft.checks.data.run import RULES
from megasft.cli.lint import lint
from megasft.data.build import BuildOptions, build
from megasft.data.formats import FieldMap
from megasft.data.tokenize import Recipe
from megasft.store import open_store
from tests.unit.checks.data.stores import STOP, built, chat, made, write

Lint = Callable[..., Result]

LEADING = chat("Bye", "\nHello")
"""One warning, nothing worse: the answer begins with a line end."""


@pytest.fixture
def run() -> Lint:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(lint)

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


def test_a_clean_file_is_one_line_and_exit_code_0(
    tmp_path: Path, tokenizer_dir: Path, run: Lint
) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"), chat("Bye", "See you"))
    seen = run(file, "--tokenizer", tokenizer_dir, "--strict")
    assert seen.exit_code == 0
    assert seen.output.startswith(f"{file}: 0 errors, 0 warnings, 0 notes in 2 samples, 2 turns, ")
    assert seen.output.endswith(f" tokens; {len(RULES)} rules checked\n")
    assert seen.output.count("\n") == 1


def test_a_finding_is_one_line_that_grep_finds_then_what_to_do(
    tmp_path: Path, tokenizer_dir: Path, run: Lint
) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"), {}, LEADING)
    lines = run(file, "--tokenizer", tokenizer_dir).output.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["error", "record-rejected", "1", "record", "33.3", "%", f"{file}:2"],
        ["warning", "leading-newline", "1", "turn", "50.0", "%", f"{file}:3"],
    ]
    text = "\n".join(lines)
    assert "record-rejected: the record cannot become a sample: missing field" in text
    assert "leading-newline: the answer begins with a line end" in text
    assert "\n  1 of 2 turns (50.0 %)\n  remedy: strip the answers\n  at: " in text
    assert "1 error, 1 warning, 0 notes" in lines[-1]


def test_exit_codes_are_for_ci(tmp_path: Path, tokenizer_dir: Path, run: Lint) -> None:
    warned = write(tmp_path / "a" / "chats.jsonl", LEADING)
    noted = write(tmp_path / "b" / "chats.jsonl", chat("Hi", "<think>\nHm\n</think>\n\nHello"))
    wrong = write(tmp_path / "c" / "chats.jsonl", chat("Hi", "Hello"), {})
    where = ("--tokenizer", tokenizer_dir)
    assert [run(f, *where).exit_code for f in (warned, noted, wrong)] == [0, 0, 1]
    assert [run(f, *where, "--strict").exit_code for f in (warned, noted, wrong)] == [1, 0, 1]
    assert run(warned, *where, "--strict", "--ignore", "leading-newline").exit_code == 0


def test_a_store_is_checked_with_the_tokenizer_it_names(
    tmp_path: Path, tokenizer_dir: Path, run: Lint
) -> None:
    store = built(tmp_path, tokenizer_dir, chat("Hi", "Hello"), LEADING)
    seen = run(store.path)
    assert seen.exit_code == 0
    assert f"{tmp_path / 'chats.jsonl'}:2" in seen.output
    assert "not checked" not in seen.output


def test_what_could_not_be_checked_is_said(tmp_path: Path, run: Lint) -> None:
    store = made(tmp_path / "store", ([1, 5, 6, 7, STOP], [(2, 3)]))
    output = run(store.path).output
    assert "not checked: leading-newline" in output
    assert "(store.json names no tokenizer; give it with --tokenizer DIR)" in output


def test_json_holds_what_is_printed(tmp_path: Path, tokenizer_dir: Path, run: Lint) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"), LEADING)
    seen = run(file, "--tokenizer", tokenizer_dir, "--json", tmp_path / "lint.json")
    report = orjson.loads((tmp_path / "lint.json").read_bytes())
    (finding,) = report["findings"]
    assert (finding["rule"], finding["severity"]) == ("leading-newline", "warning")
    assert (finding["count"], finding["share"]) == (1, 0.5)
    assert finding["examples"] == [f"{file}:2"]
    assert report["verdict"] in seen.output


def test_how_much_was_read_is_said(tmp_path: Path, tokenizer_dir: Path, run: Lint) -> None:
    store = built(tmp_path, tokenizer_dir, *(chat(f"{i}?", "<think>a</think>b") for i in range(9)))
    output = run(store.path, "--sample", 3).output
    assert "text: 3 of 9 samples were read (--sample 0 reads all)" in output
    assert "3 of 3 turns looked at (100.0 %)" in output
    assert "samples were read" not in run(store.path, "--sample", 0).output


def test_list_prints_every_rule_on_a_line(run: Lint) -> None:
    seen = run("--list")
    assert seen.exit_code == 0
    assert [line.split()[1] for line in seen.output.splitlines()] == list(RULES)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chats.jsonl"],
        ["store", "--ignore", "no-such-rule"],
        ["store", "store"],
        ["store", "--chat-template", "chats.jsonl"],
        ["store", "--json", "no/lint.json"],
        ["store", "--sample", "-1"],
    ],
)
def test_wrong_use_is_exit_code_2(
    arguments: list[str], tmp_path: Path, run: Lint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(Path("store"), ([1, 5, 6, 7, STOP], [(2, 3)]))
    write(tmp_path / "chats.jsonl", chat("Hi", "Hello"))
    assert run(*arguments).exit_code == 2


def test_a_store_is_read_as_it_was_built(tmp_path: Path, tokenizer_dir: Path, run: Lint) -> None:
    file = write(tmp_path / "pairs.jsonl", {"ask": "Hi", "reply": "Hello"})
    recipe = Recipe(
        tokenizer_dir,
        FieldMap(prompt_key="ask", response_key="reply", train_on="everything"),
    )
    options = BuildOptions((file,), tmp_path / "store", recipe)
    build(options, on_bytes=lambda n: None, on_rejected=lambda p, m: None)
    seen = run(tmp_path / "store")
    assert seen.output.splitlines()[0] == (
        "not checked: mask-all-one (the store was built with --train-on everything, --mask-*, or "
        "of pretraining texts)"
    )
    assert seen.exit_code == 0
    unsaid = open_store(tmp_path / "store").meta | {"recipe": None}
    (tmp_path / "store" / "store.json").write_bytes(orjson.dumps(unsaid))
    seen = run(tmp_path / "store")
    assert seen.exit_code == 1
    assert seen.output.splitlines()[1].split()[:2] == ["error", "mask-all-one"]
