from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasft.checks.data import subject
from megasft.checks.engine import Severity
from megasft.data import unread_keys
from megasft.store import TokenStore
from tests.tiny_tokenizer import make_tokenizer

from .stores import SPECIAL, START, STOP, Given, lint, made

SOUND: Given = ([START, 10, 11, 12, STOP, 14], [(3, 2)])
OTHER: Given = ([START, 10, 11, 13, STOP, 14], [(3, 2)])
NEVER: Given = ([START, 10, 11, 12, 13], [(3, 1)])


def _long(path: Path) -> TokenStore:
    short: list[Given] = [([START, i, 11, 12, STOP], [(3, 2)]) for i in range(10, 15)]
    return made(path, *short, ([START, *[10] * 5000, STOP], [(5000, 2)]))


SCORE = {"place": "record", "key": "score", "num_records": 2, "first": "chats.jsonl:1"}
MASK = {"place": "message", "key": "loss_masks", "num_records": 1, "first": "chats.jsonl:3"}
FIRES: dict[str, Callable[[Path], TokenStore]] = {
    "never-stops": lambda path: made(path, NEVER),
    "duplicate-conversation": lambda path: made(path, SOUND, OTHER, SOUND),
    "pad-is-eos": lambda path: made(path, SOUND, special_tokens=SPECIAL | {"pad": STOP}),
    "stop-not-eos": lambda path: made(path, SOUND, special_tokens=SPECIAL | {"eos": 0}),
    "border-token": lambda path: made(path, SOUND, counts={"border_tokens": 3}),
    "left-out": lambda path: made(
        path, SOUND, counts={"conversations": 3, "rejected": {"not JSON": 2}}
    ),
    "unread-key": lambda path: made(path, SOUND, unread_keys=[SCORE]),
    "unread-meaning": lambda path: made(path, SOUND, unread_keys=[MASK, SCORE]),
    "very-long": _long,
    "longer-than-model": lambda path: made(path, SOUND),  # with a tokenizer, below
}
OF_TOKENIZER = "longer-than-model"


@pytest.mark.parametrize("rule", sorted(FIRES.keys() - {OF_TOKENIZER}))
def test_a_rule_fires_on_its_store_and_is_silent_on_a_sound_one(rule: str, tmp_path: Path) -> None:
    assert rule in lint(FIRES[rule](tmp_path / "bad"))
    assert lint(made(tmp_path / "good", SOUND, OTHER)) == {}


def test_an_unread_key_that_sounds_like_a_label_is_an_error_with_its_first_line(
    tmp_path: Path,
) -> None:
    findings = lint(made(tmp_path / "store", SOUND, unread_keys=[MASK, SCORE]))
    assert findings["unread-key"].severity is Severity.NOTE
    assert findings["unread-meaning"].severity is Severity.ERROR
    assert findings["unread-meaning"].detail == (
        "`loss_masks` of a message: in 1 record, first at chats.jsonl:3"
    )


@pytest.mark.parametrize(
    ("meant", "keys"),
    [
        (True, ["mask", "loss_weights", "trainOn", "prompt_text", "INPUT", "images_b64"]),
        (False, ["id", "score", "prompt_id", "num_input_tokens", "parallel_tool_calls", "answer"]),
    ],
)
def test_a_key_sounds_like_a_label_by_its_words(meant: bool, keys: list[str]) -> None:
    assert [unread_keys.sounds_meant(key) for key in keys] == [meant] * len(keys)


def test_a_repeat_names_the_first_of_its_kind(tmp_path: Path) -> None:
    store = made(tmp_path / "store", SOUND, OTHER, SOUND, SOUND)
    finding = lint(store)["duplicate-conversation"]
    assert (finding.count, finding.population) == (2, 4)
    assert finding.examples == ("chats.jsonl:3", "chats.jsonl:4")
    assert finding.detail.startswith("chats.jsonl:3 repeats chats.jsonl:1; ")
    assert finding.detail.endswith("there 3 times")


def test_samples_that_only_look_alike_are_no_repeats(tmp_path: Path) -> None:
    samples: list[Given] = [
        ([1, 2, 3], []), ([3, 2, 1], []), ([1, 2], []), ([1, 2, 3, 0], []), ([0, 1, 2, 3], []),
        ([2, 1, 3], []), ([0], []), ([0, 0], []),
    ]  # fmt: skip
    keys = subject.keys_of_tokens(made(tmp_path / "store", *samples))
    assert len(set(keys.tolist())) == len(samples)


def test_numbers_of_store_json_are_reported_by_reason(tmp_path: Path) -> None:
    counts: dict[str, Any] = {
        "conversations": 10,
        "rejected": {"not JSON": 2, "no assistant turn": 1},
        "dropped": 4,
    }
    finding = lint(made(tmp_path / "store", SOUND, counts=counts))["left-out"]
    assert (finding.count, finding.population) == (7, 10)
    assert "2 x rejected: not JSON" in finding.detail
    assert "4 x dropped as too long" in finding.detail


def test_stops_that_are_not_the_eos_are_named(tmp_path: Path) -> None:
    detail = lint(FIRES["stop-not-eos"](tmp_path / "store"))["stop-not-eos"].detail
    assert detail == "ends of turns: 2; eos: 0"


def test_one_turn_that_stops_is_enough(tmp_path: Path) -> None:
    assert "never-stops" not in lint(made(tmp_path / "store", NEVER, SOUND))


def test_the_longest_samples_come_first(tmp_path: Path) -> None:
    finding = lint(_long(tmp_path / "store"))["very-long"]
    assert (finding.count, finding.examples) == (1, ("chats.jsonl:6",))


@pytest.mark.parametrize(("limit", "num"), [(5, 1), (6, 0)])
def test_a_model_reads_no_more_than_its_tokenizer_says(
    limit: int, num: int, tmp_path: Path
) -> None:
    import orjson

    folder = make_tokenizer(tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"model_max_length": limit}))
    report = lint(FIRES[OF_TOKENIZER](tmp_path / "store"), tokenizer=folder)
    assert (OF_TOKENIZER in report) == bool(num)
