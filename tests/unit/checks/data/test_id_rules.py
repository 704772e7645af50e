from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.checks.data.run import RULES
from megasft.checks.data.subject import Needs, blocks, vocabulary_of

from .stores import PAD, SPECIAL, START, STOP, Given, lint, made

BOS = 7
SOUND: Given = ([START, 10, 11, 12, 13, STOP, 14], [(3, 3)])
HEAD = [START, 10, 11]

FIRES: dict[str, Given] = {
    "stop-not-trained": ([*HEAD, 12, STOP, 14], [(3, 1)]),
    "turn-without-stop": ([*HEAD, 12, 14, 15], [(3, 1)]),
    "answer-cut": ([*HEAD, 12, 13], [(3, 2)]),
    "stop-inside-turn": ([*HEAD, 12, STOP, 13, STOP], [(3, 4)]),
    "empty-answer": ([*HEAD, STOP, 14], [(3, 1)]),
    "mask-all-zero": ([*HEAD, 12, STOP], []),
    "mask-all-one": ([*HEAD, 12, STOP], [(1, 4)]),
    "turn-out-of-range": ([*HEAD, 12, STOP], [(3, 3)]),
    "token-out-of-range": ([*HEAD, 12, 512, STOP], [(3, 3)]),
    "bos-twice": ([BOS, BOS, *HEAD, 12, STOP], [(5, 2)]),
}
"""A sample each rule fires on; none fires on ``SOUND``."""


def test_several_stops_at_the_end_of_a_turn_are_its_end(tmp_path: Path) -> None:
    ended = ([*HEAD, 12, STOP, BOS, STOP], [(3, 4)])
    assert "stop-inside-turn" not in lint_samples(tmp_path / "ended", ended)
    goes_on = ([*HEAD, 12, STOP, BOS, 13, STOP], [(3, 5)])
    assert "stop-inside-turn" in lint_samples(tmp_path / "goes_on", goes_on)


@pytest.mark.parametrize("knows_start", [False, True])
def test_an_end_between_two_messages_of_one_turn_is_no_stop_inside_it(
    tmp_path: Path, knows_start: bool
) -> None:
    """gpt-oss thinks in a message of its own, <|end|><|start|>assistant before the next one."""
    special = SPECIAL | {"bos": START if knows_start else BOS}
    header = [START, 10]

    def fires(name: str, *again: int) -> bool:
        sample = ([9, *header, 11, STOP, *again, 13, STOP], [(3, 4 + len(again))])
        report = lint(made(tmp_path / name, sample, special_tokens=special))
        return "stop-inside-turn" in report

    assert not fires("thinks", *header)
    assert not fires("thinks_twice", *header, 12, STOP, *header)
    assert fires("user", START, 14)
    assert fires("blank", 15, *header)


def lint_samples(folder: Path, *samples: Given) -> dict[str, Any]:
    return lint(made(folder / "store", *samples, special_tokens=SPECIAL | {"bos": BOS}))


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_names_the_line_of_the_one_bad_sample(rule: str, tmp_path: Path) -> None:
    others = [([START, 20 + i, 11, 12, STOP], [(3, 2)]) for i in range(3)]
    finding = lint_samples(tmp_path, SOUND, *others, FIRES[rule], ([1, 9, STOP], [(2, 1)]))[rule]
    assert finding.examples[0] == "chats.jsonl:5"
    assert (finding.count, finding.population) == {
        "turns": (1 + (rule == "empty-answer"), 6),
        "samples": (1, 6),
    }[finding.unit]


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_is_silent_on_a_sound_sample(rule: str, tmp_path: Path) -> None:
    assert lint_samples(tmp_path, SOUND) == {}


@pytest.mark.parametrize("records", [[(0, 2)], [(3, 0)], [(3, -1)], [(5, 2)], [(2, 3), (4, 1)]])
def test_records_outside_their_sample_break_no_other_rule(
    records: list[tuple[int, int]], tmp_path: Path
) -> None:
    finding = lint_samples(tmp_path, ([*HEAD, 12, STOP], records), SOUND)["turn-out-of-range"]
    assert (finding.count, finding.examples) == (1, ("chats.jsonl:1",))


def test_a_turn_over_everything_is_one_finding_and_no_complaint_about_its_inside(
    tmp_path: Path,
) -> None:
    whole: Given = ([START, 10, STOP, 14, START, 12, STOP, 14], [(1, 7)])
    assert set(lint_samples(tmp_path, whole)) == {"mask-all-one"}


def test_each_turn_without_stop_falls_under_one_of_three_rules(tmp_path: Path) -> None:
    samples = [FIRES[name] for name in ("stop-not-trained", "turn-without-stop", "answer-cut")]
    report = lint_samples(tmp_path, SOUND, *samples)
    assert {name: f.count for name, f in report.items()} == {
        "stop-not-trained": 1,
        "turn-without-stop": 1,
        "answer-cut": 1,
    }


def test_an_eos_that_is_the_pad_still_stops_a_turn(tmp_path: Path) -> None:
    special = {"bos": None, "eos": PAD, "pad": PAD, "end_of_turn": [PAD]}
    store = made(tmp_path / "store", ([START, 10, 11, 12, PAD], [(3, 2)]), special_tokens=special)
    assert set(lint(store)) == {"pad-is-eos"}


def test_blank_and_newline_tokens_are_known_from_the_tokenizer(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizer_dir)
    blank, newline, word = (hf.encode(text)[0] for text in (" ", "\n", "a"))
    samples: list[Given] = [
        ([*HEAD, blank, newline, STOP], [(3, 3)]),
        ([*HEAD, newline, word, STOP], [(3, 3)]),
        ([*HEAD, word, newline, STOP], [(3, 3)]),
    ]
    report = lint(made(tmp_path / "store", *samples), tokenizer=tokenizer_dir)
    assert report["empty-answer"].examples == ("chats.jsonl:1",)
    assert report["leading-newline"].examples == ("chats.jsonl:2",)


def test_unknown_tokens_are_counted_where_the_tokenizer_has_one(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    import shutil

    import orjson

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    file = folder / "tokenizer_config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"unk_token": "!"}))
    from transformers import AutoTokenizer

    unknown = AutoTokenizer.from_pretrained(folder).unk_token_id
    store = made(tmp_path / "store", SOUND, ([*HEAD, unknown, 13, STOP], [(3, 3)]))
    finding = lint(store, tokenizer=folder)["unknown-token"]
    assert (finding.count, finding.examples) == (1, ("chats.jsonl:2",))
    assert "unknown-token" not in lint(store, tokenizer=tokenizer_dir)


@settings(max_examples=30, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=12),
    block_tokens=st.integers(1, 40),
)
def test_findings_do_not_depend_on_how_a_store_is_cut_into_blocks(
    data: list[tuple[int, int, bool]], block_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    samples: list[Given] = [
        ([START] * head + [12] * body + [STOP] * stops, [(head, body + stops)])
        for head, body, stops in data
    ]
    store = made(tmp_path_factory.mktemp("store") / "s", *samples)
    vocabulary = vocabulary_of(store)
    rules = {name: rule for name, rule in RULES.items() if Needs.IDS in rule.needs}
    assert len(rules) > 10
    for rule in rules.values():
        small = [
            (rule(block, vocabulary) + block.first).tolist()
            for block in blocks(store, block_tokens=block_tokens)
        ]
        large = [(rule(b, vocabulary) + b.first).tolist() for b in blocks(store)]
        assert list(chain(*small)) == list(chain(*large))
    assert sum(b.num_samples for b in blocks(store, block_tokens=block_tokens)) == len(samples)
    cut = [i for i, (_, _, stops) in enumerate(data) if not stops]
    hits = [rules["answer-cut"](b, vocabulary) + b.first for b in blocks(store)]
    assert np.concatenate([*hits, np.zeros(0, int)]).tolist() == cut
