"""`megasft mix` as a user sees it, and OpenSFT's data flow with its own config file."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megasft.draw import draw
from megasft.mixture import read_mixture
from megasft.packing.plan import plan_rows
from megasft.store import open_store
from megasft.store_group import population_of

from .conftest import Seen

Megasft = Callable[..., Seen]

CATEGORIES = {1: "stem_zh/phy", 2: "ruozhiba"}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Preprocessed conversations, and the config OpenSFT writes with them."""
    lines = []
    for i in range(30):
        number = 1 + (i >= 10)
        lines.append(
            {
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"A number, {i}."},
                ],
                "labels": [0, 0, 1],
                "meta": {"category_id": number, "category_name": CATEGORIES[number]},
            }
        )
    (tmp_path / "pre.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    ratio = [
        {"category_id": i, "category_name": CATEGORIES[i], "size": size, "sample_rate": rate}
        for i, size, rate in ((1, 10, 2.3), (2, 20, 0.8))
    ]
    config = {"data_name": "demo", "data_path": str(tmp_path / "pre.jsonl"), "ratio": ratio}
    (tmp_path / "ratio.json").write_bytes(orjson.dumps(config))
    return tmp_path


def test_opensfts_flow_samples_joins_builds_and_packs(
    raw: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    """Sample by ratio, pseudo multi-turn, tokenize, pack to 131,072; the config is unchanged."""
    sampled, store = raw / "sampled.jsonl", raw / "store"
    seen = megasft(
        *("mix", "--config", raw / "ratio.json", "--input", raw / "pre.jsonl"),
        *("--output", sampled, "--join-probability", 0.3, "--seed", 42),
    )
    assert (seen.code, seen.err) == (0, "")
    lines = [orjson.loads(line) for line in sampled.read_bytes().splitlines()]
    first, head, *table, turns = seen.out.splitlines()
    assert first == f"{sampled}: {len(lines)} conversations of 39 records drawn, from 30 read"
    assert head.split() == ["category", "before", "after"]
    assert [row.split() for row in table] == [["stem_zh/phy", "10", "23"], ["ruozhiba", "20", "16"]]
    assert turns.strip() == f"turns a conversation: 1.00 before, {39 / len(lines):.2f} after"
    assert 20 < len(lines) < 35

    build = ("build", "--input", sampled, "--tokenizer", tokenizer_dir, "--output", store)
    assert megasft(*build).code == 0
    opened = open_store(store)
    assert opened.meta["categories"] == {"1": "stem_zh/phy", "2": "ruozhiba"}
    trained = [row for i in range(len(opened)) for row in opened.sample(i).turns.tolist()]
    assert Counter(category for _, _, category, *_ in trained) == {1: 23, 2: 16}
    plan = plan_rows(opened, row_tokens=131_072, align_tokens=8, seed=42)
    assert (len(plan), int(plan.turns.sum())) == (1, 39)


def test_the_same_config_draws_from_a_store_of_the_whole_data(
    raw: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    """No new tokens for a new mixture."""
    store = raw / "store"
    build = ("build", "--input", raw / "pre.jsonl", "--tokenizer", tokenizer_dir, "-o", store)
    assert megasft(*build).code == 0
    made = draw(read_mixture(raw / "ratio.json"), population_of(open_store(store)), seed=42)
    assert [(part.found, part.drawn) for part in made.parts] == [(10, 23), (20, 16)]
    assert made.warnings == ()


def test_the_data_of_the_config_is_read_when_no_input_is_named(raw: Path, megasft: Megasft) -> None:
    named, own = raw / "named.jsonl", raw / "own.jsonl"
    config = ("mix", "--config", raw / "ratio.json")
    assert megasft(*config, raw / "pre.jsonl", "-o", named).code == 0
    assert megasft(*config, "-o", own, "--seed", 42).code == 0
    assert named.read_bytes() == own.read_bytes() != b""


def test_a_size_other_than_found_is_a_warning(raw: Path, megasft: Megasft) -> None:
    with (raw / "pre.jsonl").open("ab") as file:
        file.write(b"\n" + (raw / "pre.jsonl").read_bytes().splitlines()[0])
    seen = megasft("mix", "--config", raw / "ratio.json", "-o", raw / "out.jsonl")
    assert seen.code == 0
    assert "warning: " in seen.err
    assert "stem_zh/phy (1) has size 10, and 11 samples are found" in seen.err


def test_bad_records_are_named_and_counted(raw: Path, megasft: Megasft) -> None:
    bad = raw / "bad.jsonl"
    bad.write_bytes(b"{}\n" * 25 + b'{"prompt": "Q", "response": "A"}\n')
    command = ("mix", "-i", bad, "-o", raw / "out.jsonl")
    seen = megasft(*command)
    assert seen.code == 1
    assert f"{bad}:20: missing field:" in seen.err
    assert f"{bad}:21:" not in seen.err
    assert "25 of 26 records are bad (25 x missing field); no file was made" in seen.err
    seen = megasft(*command, "--skip-bad")
    assert "left out 25 x missing field" in seen.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "out.jsonl"], "nothing to read; give --input, or a --config"),
        (["-i", "x", "-o", "out.jsonl.gz"], "plain jsonl is written"),
        (["-i", "x", "-o", "out.jsonl"], "x is not a file"),
        (["--config", "none.yaml", "-o", "out.jsonl"], "none.yaml cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    megasft: Megasft, flags: list[object], message: str
) -> None:
    seen = megasft("mix", *flags)
    assert seen.code == 1
    assert message in seen.err


def test_two_seeds_are_refused(raw: Path, megasft: Megasft) -> None:
    (raw / "own.yaml").write_text(f"seed: 7\nrest: keep\nparts: [{{source: {raw}/pre.jsonl}}]")
    command = ("mix", "--config", raw / "own.yaml", "-o", raw / "out.jsonl")
    seen = megasft(*command, "--seed", 8)
    assert (seen.code, "--seed is 8, and --config has seed 7" in seen.err) == (1, True)
    assert megasft(*command, "--seed", 7).code == 0
