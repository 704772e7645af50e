"""Values stay what they are, and whatever goes wrong with one record is a bad record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from megasft.checks.data.run import LintOptions, lint_files
from megasft.data import exact_json
from megasft.data.formats import FieldMap, parse
from megasft.data.tokenize import Made, Outcome, Recipe, Rejected, Tokenizer
from megasft.errors import DataError
from tests.tiny_tokenizer import make_tokenizer

HI: Final = {"role": "user", "content": "Hi"}
YO: Final = {"role": "assistant", "content": "Yo"}


def calls(arguments: str, name: str = "f") -> str:
    return (
        '{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": '
        f'{{"name": "{name}", "arguments": {arguments}}}}}]}}'
    )


def record(answer: str, **more: str) -> bytes:
    fields = "".join(f', "{key}": {value}' for key, value in more.items())
    return f'{{"messages": [{{"role": "user", "content": "Hi"}}, {answer}]{fields}}}'.encode()


def trained(tokenizer: Tokenizer, data: bytes) -> str:
    (made,) = tokenizer.make([(1, data)])
    assert isinstance(made, Made), made
    tokens, turns = made.sample
    start, num_tokens = turns[0, :2].tolist()
    backend = tokenizer._folder.hf.backend_tokenizer
    return str(backend.decode(tokens[start : start + num_tokens].tolist(), False))


@pytest.mark.parametrize(
    "number",
    [
        "12345678901234567890123", "-9223372036854775809", "18446744073709551616",
        "9007199254740993", "1.1", "1e+16", "0.30000000000000004", "-0.0", "5e-324", "1" * 400,
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["arguments", "text", "tools", "kwargs"])
def test_a_number_of_any_size_stays_exact(
    calls_tokenizer: Tokenizer, number: str, place: str
) -> None:
    arguments = f'{{"id": {number}, "x": [1, {{"y": {number}}}]}}'
    if place == "tools":
        tools = f'[{{"type": "function", "function": {{"name": "f", "maximum": {number}}}}}]'
        conversation = parse(record('{"role": "assistant", "content": "Yo"}', tools=tools), AUTO)
        assert json.dumps(conversation.tools) == f"[{tools[1:-1]}]"
    elif place == "kwargs":
        data = record('{"role": "assistant", "content": "Yo"}', chat_template_kwargs=arguments)
        assert json.dumps(dict(parse(data, AUTO).template_kwargs)) == arguments
    else:
        written = arguments if place == "arguments" else json.dumps(arguments)
        answer = trained(calls_tokenizer, record(calls(written)))
        assert answer == f'<call>{{"name": "f", "arguments": {arguments}}}</call><|im_end|>'


AUTO: Final = FieldMap()


@pytest.mark.parametrize("depth", [100, 300, 600, 2_000, 100_000])
@pytest.mark.parametrize("place", ["arguments", "tools", "meta", "unread"])
def test_nesting_of_any_depth_is_built_or_a_bad_record(
    calls_tokenizer: Tokenizer, depth: int, place: str
) -> None:
    deep = '{"k": ' * depth + "1" + "}" * depth
    good = record('{"role": "assistant", "content": "Yo"}')
    data = {
        "arguments": record(calls(deep)),
        "tools": record('{"role": "assistant", "content": "Yo"}', tools=f"[{deep}]"),
        "meta": record('{"role": "assistant", "content": "Yo"}', meta=deep),
        "unread": record('{"role": "assistant", "content": "Yo"}', score=deep),
    }[place]
    first, made, last = calls_tokenizer.make([(1, good), (2, data), (3, good)])
    assert isinstance(first, Made)
    assert isinstance(last, Made)
    if depth == 100:
        assert isinstance(made, Made)
    if depth == 100_000:
        assert isinstance(made, Rejected)
    if isinstance(made, Rejected):
        assert made.line == 2
        assert made.detail


def test_an_exception_that_nobody_foresaw_costs_the_record_alone(
    calls_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Tokenizer._finish

    def fails(self: Tokenizer, items: Any, encoder: Any) -> dict[int, Outcome]:
        if any(item.line == 2 for item in items):
            raise ZeroDivisionError("who would have thought")
        return original(self, items, encoder)

    monkeypatch.setattr(Tokenizer, "_finish", fails)
    lines = [(line, orjson.dumps({"messages": [HI, YO]})) for line in (1, 2, 3)]
    first, bad, last = calls_tokenizer.make(lines)
    assert bad == Rejected(
        2, "failed", "no sample could be made: ZeroDivisionError: who would have thought"
    )
    assert isinstance(first, Made)
    assert isinstance(last, Made)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_nan_is_read_where_nobody_needs_it_and_refused_where_it_matters(
    calls_tokenizer: Tokenizer, constant: str
) -> None:
    yo = '{"role": "assistant", "content": "Yo"}'
    assert trained(calls_tokenizer, record(yo, score=constant)) == "Yo<|im_end|>"
    for data in (
        record(calls(f'{{"x": {constant}}}')),
        record(calls(json.dumps(f'{{"x": {constant}}}'))),
        record(yo, tools=f'[{{"x": {constant}}}]'),
        record(f'{{"role": "assistant", "content": "Yo", "weight": {constant}}}'),
        record(f'{{"role": "assistant", "content": {constant}}}'),
    ):
        (bad,) = calls_tokenizer.make([(7, data)])
        assert isinstance(bad, Rejected), data
        assert bad.line == 7


def test_what_is_no_json_is_none_with_nan_in_it() -> None:
    for text in (b'{"a": NaN,}', b'{"a": NaN', b"{'a': NaN}", b'{"a": nan}'):
        with pytest.raises(orjson.JSONDecodeError):
            exact_json.load(text)


CITY: Final = '{"type": "object", "properties": {"city": {"type": "string"}%s}}'
TOOL: Final = '[{"type": "function", "function": {"name": "f", "parameters": %s}}]'


@pytest.mark.parametrize(
    ("hits", "arguments", "parameters"),
    [
        (0, '{"city": "Oslo"}', CITY % ""),
        (0, '{"city": null}', CITY % ""),  # the author's own
        (0, '{"city": "Oslo"}', CITY % ', "zone": {"default": null, "enum": [1, null]}'),
        (1, '{"city": "Oslo", "zone": null}', CITY % ""),
        (1, '{"city": "Oslo"}', CITY % ', "zone": null'),
        (1, '{"city": "Oslo", "zone": null, "n": null}', CITY % ', "zone": null'),
        (1, "{}", '{"properties": {"a": {"properties": {"b": null}}}}'),
        (1, '{"city": "Oslo", "zone": null}', ""),
    ],
)
def test_nulls_that_a_table_put_into_json_are_found_by_lint(
    tmp_path: Path, calls_dir: Path, hits: int, arguments: str, parameters: str
) -> None:
    file = tmp_path / "chats.jsonl"
    tools = {"tools": TOOL % parameters} if parameters else {}
    file.write_bytes(record(calls(arguments), **tools) + b"\n")
    report = lint_files((file,), LintOptions(calls_dir))
    found = {finding.rule: finding.count for finding in report.findings}
    assert found.get("nulls-padded", 0) == hits
    if not hits:
        assert not found


def test_pretraining_text_is_clean_for_lint(tmp_path: Path, calls_dir: Path) -> None:
    file = tmp_path / "texts.jsonl"
    text, chat = {"text": "Water boils."}, {"messages": [HI, YO]}
    file.write_bytes(orjson.dumps(text) + b"\n" + orjson.dumps(chat))
    assert lint_files((file,), LintOptions(calls_dir)).findings == ()


def _no_tokenizer(path: Path) -> None:
    (path / "tekken.json").write_text("{}")


def _broken_json(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"model": ')


def _other_json(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"model": 7}')


def _broken_template(path: Path) -> None:
    make_tokenizer(path, chat_template="{% for %}")


def _nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (_no_tokenizer, "tekken.json"),
        (_broken_json, "holds no tokenizer that can be loaded"),
        (_other_json, "holds no tokenizer that can be loaded"),
        (_broken_template, "TemplateSyntaxError"),
        (_nothing, "none of tokenizer.json, tokenizer.model, spiece.model is there"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_message_with_its_cause(
    tmp_path: Path, spoil: Callable[[Path], None], cause: str
) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=cause) as caught:
        Tokenizer(Recipe(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
