"""Zero differing tokens against an oracle that shares no code with the engine.

Some 1,700 generated conversations in seven families of templates; see ``families`` for the oracle.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.unit.data.families import FAMILIES, Record, content_of, template_of, texts_of
from tests.unit.data.mask_oracle import (
    Built,
    Expected,
    build_by_command,
    build_samples,
    expected_sample,
    load_hf,
    make_family_tokenizer,
)

NUM_ESCAPED, NUM_OTHERS = 90, 45

FRAGMENTS: Final = (
    "Hello", "the answer is 42", " two", "don't", "naïve café", "1234567", "3.14", "--- | <b>",
    "你好，世界", "今天天气怎么样？", "巴黎", "こんにちは", "안녕하세요", "Привет",
    "ｗｉｄｅ　ｏｎｅｓ",
    "😀", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷", "e\u0301te\u0301", "n\u0303", "\u0301", "a\u200db", "\u3000",
    "\xa0",
    "def add(a, b):\n    return a + b\n", "x = [1, 2]\t# ok", "\r\n", "\n", "\n\n", " ", "\t",
    "user", "assistant", "system", "model", "A: ", "Q:", "[INST", "<|im_", "tool_call>", "None",
)  # fmt: skip
EDGES: Final = ("", "", "", "", "\n", "\n\n", " ", "  \n", "\t", "\u3000")
ONE_CHARACTER: Final = ("a", "7", "是", "😀", "\u0301", "\n", " ", ".", "\u200d")
TOOLS: Final[list[Record]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "今天的 weather, e.g. “15°”",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


class Author:
    """Writes nasty conversations of one family, the same ones for the same seed."""

    def __init__(self, name: str, *seed: int, writes_controls: bool) -> None:
        self._rng = np.random.default_rng([*seed, list(FAMILIES).index(name)])
        self._name, self._family, self._writes_controls = name, FAMILIES[name], writes_controls
        self._said: list[str] = ["same"]

    def conversation(self) -> Record:
        messages: list[Record] = []
        uses_tools = self._family.has_tools and self._chance(0.35)
        if self._chance(0.4):
            messages.append(
                {"role": "system", "content": "" if self._chance(0.3) else self._text()}
            )
        for _ in range(int(self._rng.integers(1, 5))):
            messages.append({"role": "user", "content": self._text()})
            if uses_tools and self._chance(0.6):
                messages += self._tool_use()
            messages.append(self._answer())
            if not self._family.alternates and self._chance(0.05):
                messages.append(self._answer())
        record: Record = {"messages": messages}
        if uses_tools:
            record["tools"] = TOOLS
        if self._chance(0.4):
            record["labels"] = self._rng.integers(0, 2, len(messages)).tolist()
        return record

    def _chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def _pick(self, texts: tuple[str, ...] | list[str]) -> str:
        return texts[int(self._rng.integers(len(texts)))]

    def _text(self) -> str:
        kind = self._rng.random()
        if kind < 0.1:
            return self._pick(self._said)
        if kind < 0.2:
            return self._pick(ONE_CHARACTER)
        words = [self._pick(FRAGMENTS) for _ in range(int(self._rng.integers(1, 8)))]
        if self._writes_controls and self._chance(0.15):
            words.append(f'print("{self._pick(self._family.special)}")')
        text = self._pick(EDGES) + self._pick(("", " ", "\n")).join(words) + self._pick(EDGES)
        self._said.append(text)
        return text

    def _answer(self) -> Record:
        text = "" if self._chance(0.05) else self._text()
        thinks = self._chance(0.5 if self._family.thinks else 0.1)
        if not thinks:
            parts = [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]
            return {"role": "assistant", "content": parts if self._chance(0.1) else text}
        thinking = f"{self._pick(EDGES)}Hm, {self._text()}."
        if self._name == "qwen3" and self._chance(0.4):
            return {"role": "assistant", "content": text, "reasoning_content": thinking}
        gap = self._pick(["", "\n", "\n\n"])
        return {"role": "assistant", "content": f"<think>\n{thinking}\n</think>{gap}{text}"}

    def _tool_use(self) -> list[Record]:
        arguments: Any = {"city": self._text(), "days": int(self._rng.integers(9))}
        count = 1 if self._name == "llama3" else int(self._rng.integers(1, 3))
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        answers_first = self._name not in ("llama3", "mistral") and self._chance(0.5)
        text = self._text() if answers_first else ""
        asks = {"role": "assistant", "content": text, "tool_calls": [call] * count}
        return [asks] + [{"role": "tool", "content": self._text()} for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("families")
    return {name: make_family_tokenizer(name, parent / name) for name in FAMILIES}


def assert_same(got: Built, want: Expected, record: Record) -> None:
    if not want.turns:
        assert got.reason == "nothing to train", record
        return
    assert not got.reason, (got.reason, record)
    assert got.tokens == want.tokens, record
    differing = [
        i for i, pair in enumerate(zip(got.mask, want.mask, strict=True)) if len({*pair}) > 1
    ]
    assert not differing, (differing, record)
    assert [message for _, _, message in got.turns] == want.turns, record
    ends = [0, *(start + num_tokens for start, num_tokens, _ in got.turns)]
    assert all(end <= start for end, (start, *_) in zip(ends, got.turns, strict=False)), record


def holds_controls(record: Record, name: str) -> bool:
    return any(token in _all_text(record["messages"]) for token in FAMILIES[name].special)


def _all_text(value: Any) -> str:
    if isinstance(value, dict):
        return "\0".join(map(_all_text, value.values()))
    return "\0".join(map(_all_text, value)) if isinstance(value, list) else str(value)


def written(name: str, seed: int, count: int, *, writes_controls: bool) -> list[Record]:
    author = Author(name, seed, writes_controls=writes_controls)
    return [author.conversation() for _ in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_writes_what_transformers_renders(name: str, folders: dict[str, Path]) -> None:
    hf = load_hf(folders[name])
    for record in written(name, 0, 60, writes_controls=True):
        messages = [m | {"content": content_of(m)} for m in record["messages"]]
        render = hf.apply_chat_template(messages, tools=record.get("tools"), tokenize=False)
        assert texts_of(FAMILIES[name].oracle(record, False)) == render


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_with_special_tokens_in_the_text_escaped(name: str, folders: dict[str, Path]) -> None:
    records = written(name, 1, NUM_ESCAPED, writes_controls=True)
    built = build_samples(records, folders[name], special_tokens_in_text="escape")
    hf, family = load_hf(folders[name]), FAMILIES[name]
    wanted = [expected_sample(record, family, hf, escapes=True) for record in records]
    for got, want, record in zip(built, wanted, records, strict=True):
        assert_same(got, want, record)
    assert sum(holds_controls(record, name) for record in records) > 20
    assert sum(bool(want.turns) for want in wanted) > NUM_ESCAPED / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_with_special_tokens_in_the_text_kept(name: str, folders: dict[str, Path]) -> None:
    records = written(name, 2, NUM_OTHERS, writes_controls=True)
    built = build_samples(records, folders[name], special_tokens_in_text="keep")
    hf, family = load_hf(folders[name]), FAMILIES[name]
    for got, record in zip(built, records, strict=True):
        assert_same(got, expected_sample(record, family, hf, escapes=False), record)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_by_the_slow_roads(name: str, folders: dict[str, Path]) -> None:
    records = written(name, 8, NUM_OTHERS, writes_controls=True)
    built = build_samples(records, folders[name], encoder="tokenizers", check_all=True)
    hf, family = load_hf(folders[name]), FAMILIES[name]
    for got, record in zip(built, records, strict=True):
        assert_same(got, expected_sample(record, family, hf, escapes=True), record)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_where_special_tokens_in_the_text_are_rejected(
    name: str, folders: dict[str, Path]
) -> None:
    records = written(name, 3, NUM_OTHERS, writes_controls=True)
    built = build_samples(records, folders[name], special_tokens_in_text="reject")
    hf, family = load_hf(folders[name]), FAMILIES[name]
    num_rejected = 0
    for got, record in zip(built, records, strict=True):
        want = expected_sample(record, family, hf, escapes=False)
        if holds_controls(record, name):
            num_rejected += 1
            reasons = ("special token in the text", "nothing to train")
            assert got.reason in reasons[: 2 - bool(want.turns)], record
        else:
            assert_same(got, want, record)
    assert num_rejected > 10


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].thinks])
def test_turns_without_their_thinking_are_trained_or_rejected_on_demand(
    name: str, folders: dict[str, Path]
) -> None:
    records = written(name, 4, NUM_OTHERS, writes_controls=False)
    hf, family = load_hf(folders[name]), FAMILIES[name]
    trained = build_samples(records, folders[name], stripped_thinking="train")
    rejected = build_samples(records, folders[name], stripped_thinking="reject")
    num_stripped = 0
    for index, record in enumerate(records):
        whole = expected_sample(record, family, hf, escapes=True, trains_stripped=True)
        assert_same(trained[index], whole, record)
        masked = expected_sample(record, family, hf, escapes=True)
        if masked.turns == whole.turns:
            assert_same(rejected[index], whole, record)
        else:
            num_stripped += 1
            assert rejected[index].reason, record
    assert num_stripped > 10


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_a_turn_whose_thinking_field_the_template_ignores_is_not_trained(
    name: str, folders: dict[str, Path]
) -> None:
    messages: list[Record] = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    (got,) = build_samples([{"messages": messages}], folders[name])
    want = {"messages": messages, "labels": [0, 0, 0, 1]}
    assert_same(
        got, expected_sample(want, FAMILIES[name], load_hf(folders[name]), escapes=True), want
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_training_the_last_turn_or_everything(name: str, folders: dict[str, Path]) -> None:
    records = written(name, 5, 20, writes_controls=False)
    hf, family = load_hf(folders[name]), FAMILIES[name]
    for record in records:
        record.pop("labels", None)
    last = build_samples(records, folders[name], train_on="last-turn")
    everything = build_samples(records, folders[name], train_on="everything")
    for index, record in enumerate(records):
        whole = expected_sample(record, family, hf, escapes=True)
        assert everything[index].tokens == whole.tokens
        assert [turn[:2] for turn in everything[index].turns] == [(1, len(whole.tokens) - 1)]
        final = max(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        labels = [int(i == final) for i in range(len(record["messages"]))]
        want = expected_sample(record | {"labels": labels}, family, hf, escapes=True)
        assert_same(last[index], want, record)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_tokens_half_in_an_answer_are_counted(name: str, folders: dict[str, Path]) -> None:
    # `A: ` glues to the first word; Qwen's header ends in a newline, which more newlines join.
    records = written(name, 6, NUM_OTHERS, writes_controls=False)
    hf, num_border_tokens = load_hf(folders[name]), 0
    for got, record in zip(build_samples(records, folders[name]), records, strict=True):
        want = expected_sample(record, FAMILIES[name], hf, escapes=True)
        assert got.num_border_tokens == want.num_border_tokens, record
        num_border_tokens += want.num_border_tokens
    assert num_border_tokens > 10


def test_the_command_makes_the_same_samples(folders: dict[str, Path]) -> None:
    records = written("qwen3", 7, NUM_OTHERS, writes_controls=True)
    flags = ("--special-tokens-in-text=reject", "--stripped-thinking=train")
    by_command = build_by_command(records, folders["qwen3"], *flags)
    options = {"special_tokens_in_text": "reject", "stripped_thinking": "train"}
    built = build_samples(records, folders["qwen3"], **options)
    assert by_command == [item._replace(num_border_tokens=0) for item in built]
    assert any(item.reason for item in built)


def test_a_template_without_a_system_role_refuses_it(tmp_path: Path) -> None:
    refusal = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    )
    folder = make_family_tokenizer("gemma", tmp_path / "gemma", refusal + template_of("gemma"))
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    system = [{"role": "system", "content": "Be kind."}]
    refused, good = build_samples([{"messages": system + turn}, {"messages": turn}], folder)
    assert refused.reason == "the template refused"
    want = expected_sample({"messages": turn}, FAMILIES["gemma"], load_hf(folder), escapes=True)
    assert_same(good, want, {"messages": turn})
