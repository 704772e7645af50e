"""Sampling, shuffling and joining of conversation files."""

import gzip
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from megasft.data.formats import FieldMap, parse
from megasft.data.join import join
from megasft.data.mix import Mixed, MixOptions, mix
from megasft.errors import DataError
from megasft.mixture import read_mixture

WriteJsonl = Callable[..., Path]


def record(
    number: int, category: str | None = "maths", *, system: str | None = None, **more: Any
) -> dict[str, Any]:
    """A conversation of one answer."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = [
        *first,
        {"role": "user", "content": f"Q{number}"},
        {"role": "assistant", "content": f"A{number}"},
    ]
    meta = {} if category is None else {"meta": {"category_name": category}}
    return {"messages": messages} | meta | more


class Ran:
    """What a call of ``mix`` made, and what it reported on the way."""

    def __init__(self, options: MixOptions) -> None:
        self.complaints: list[tuple[str, str]] = []
        self.bytes: tuple[int, ...] = (0, 0)
        self.records: tuple[int, ...] = (0, 0)
        self.made: Mixed = mix(
            options,
            on_bytes=self._count_bytes,
            on_record=self._count_record,
            on_rejected=lambda *complaint: self.complaints.append(complaint),
        )
        self.lines = options.output.read_bytes().splitlines()
        left = {p.name for p in options.output.parent.iterdir()}
        assert not [name for name in left if name.endswith((".spool", ".partial"))]

    def _count_bytes(self, *done_and_total: int) -> None:
        assert done_and_total > self.bytes
        self.bytes = done_and_total

    def _count_record(self, *done_and_total: int) -> None:
        self.records = done_and_total


def run(*inputs: Path, mixture: dict[str, Any] | None = None, **options: Any) -> Ran:
    folder = inputs[0].parent
    parsed = None
    if mixture is not None:
        (folder / "mixture.json").write_bytes(orjson.dumps(mixture))
        parsed = read_mixture(folder / "mixture.json")
    wanted: dict[str, Any] = {
        "output": folder / "mixed.jsonl",
        "seed": 42,
        "overwrite": True,
    } | options
    return Ran(MixOptions(tuple(map(str, inputs)), mixture=parsed, **wanted))


# Sampling


def test_opensfts_ratio_is_applied_and_records_stay_what_they_were(
    write_jsonl: WriteJsonl,
) -> None:
    """10 at 2.3 and 20 at 0.8, by the very file OpenSFT writes."""
    metas = [{"category_id": 1, "category_name": "a"}, {"category_id": 2, "category_name": "b"}]
    lines = [
        orjson.dumps(record(i, None, labels=[0, 1], meta=metas[i % 3 > 0], note=i) | {"pad": " "})
        for i in range(30)
    ]
    ratio = [
        {"category_id": 1, "category_name": "a", "size": 10, "sample_rate": 2.3},
        {"category_id": 2, "category_name": "b", "size": 20, "sample_rate": 0.8},
    ]
    ran = run(
        write_jsonl(*lines), mixture={"data_name": "demo", "data_path": "gone", "ratio": ratio}
    )

    times = Counter(ran.lines)
    assert set(times) <= set(lines)
    assert Counter(times[line] for line in lines[::3]) == {2: 7, 3: 3}
    assert Counter(times[line] for i, line in enumerate(lines) if i % 3) == {1: 16, 0: 4}
    assert ran.made.categories == [("a", 10, 23), ("b", 20, 16)]
    assert (ran.made.num_read, ran.made.num_drawn, ran.made.num_written) == (30, 39, 39)
    assert ran.records == (39, 39)
    assert ran.bytes == (size := sum(len(line) + 1 for line in lines), size)
    assert ran.made.warnings == ()
    assert ran.lines != sorted(ran.lines)


def test_the_seed_decides_the_bytes_and_nothing_else_does(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(*(record(i) for i in range(50)))
    mixture = {"parts": [{"category": "maths", "sample_rate": 0.5}]}
    first, again = (run(path, mixture=mixture, join_probability=0.4) for _ in range(2))
    other = run(path, mixture=mixture, join_probability=0.4, seed=43)
    assert first.lines == again.lines
    assert sorted(first.lines) != sorted(other.lines)


def test_without_a_mixture_every_record_is_written_once_in_another_order(
    write_jsonl: WriteJsonl,
) -> None:
    records = [orjson.dumps(record(i, None)) for i in range(40)]
    ran = run(write_jsonl(*records))
    assert sorted(ran.lines) == sorted(records)
    assert ran.lines != records
    assert ran.made.categories == [("(none)", 40, 40)]


def test_files_of_every_kind_are_mixed_by_name(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    """What cannot be read at a place is copied first; formats need not agree."""
    plain = write_jsonl(record(0), b"", record(1), name="plain.jsonl")
    packed = tmp_path / "packed.jsonl.gz"
    pair = orjson.dumps({"prompt": "Q2", "answer": "A2"})
    packed.write_bytes(gzip.compress(pair + b"\r\n"))
    listed = tmp_path / "listed.json"
    listed.write_bytes(b"\xef\xbb\xbf" + orjson.dumps([record(3), record(4)]))
    parts = [{"source": "plain"}, {"source": "packed", "sample_rate": 3}, {"source": str(listed)}]
    ran = run(plain, packed, listed, mixture={"parts": parts})
    answers = [parse(line, FieldMap()).messages[-1].content for line in ran.lines]
    assert Counter(answers) == {"A0": 1, "A1": 1, "A2": 3, "A3": 1, "A4": 1}


def test_a_table_and_a_folder_are_inputs_too(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "tables").mkdir()
    table = pyarrow.Table.from_pylist([record(i) for i in range(3)])
    parquet.write_table(table, tmp_path / "tables" / "some.parquet")
    parts = [{"source": "tables", "sample_rate": 2}]
    ran = run(tmp_path / "tables", mixture={"parts": parts}, output=tmp_path / "out.jsonl")
    assert len(ran.lines) == 6
    assert Counter(map(len, map(orjson.loads, ran.lines))) == {2: 6}


def test_a_bom_and_a_last_line_without_an_end_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [orjson.dumps(record(i)) for i in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  \n" + lines[1])
    assert sorted(run(path).lines) == lines


def test_bad_records_are_named_and_stop_the_mix_unless_skipped(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(record(0), b"{no json", record(1) | {"messages": [{"role": "user"}]})
    with pytest.raises(DataError, match=r"2 of 3 records are bad \(1 x missing field; 1 x not JS"):
        run(path)
    assert not (path.parent / "mixed.jsonl").exists()
    ran = run(path, skip_bad=True)
    assert [place for place, _ in ran.complaints] == [f"{path}:2", f"{path}:3"]
    assert len(ran.lines) == 1
    assert ran.made.rejected == {"not JSON": 1, "missing field": 1}


def test_a_record_nothing_is_trained_of_is_the_builds_business(write_jsonl: WriteJsonl) -> None:
    silent = record(0, labels=[0, 0])
    ran = run(write_jsonl(silent, record(1)), join_probability=1.0)
    assert sorted(map(orjson.loads, ran.lines), key=len)[1] == silent


def test_a_curriculum_has_no_effect_on_a_file_and_is_refused(write_jsonl: WriteJsonl) -> None:
    mixture = {"parts": [{"category": "maths"}], "curriculum": "sequential"}
    with pytest.raises(DataError, match="give the training --megasft-mixture instead"):
        run(write_jsonl(record(0)), mixture=mixture)


def test_an_output_that_is_there_or_is_an_input_is_not_touched(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(record(0))
    (path.parent / "mixed.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists already; pass --overwrite"):
        run(path, overwrite=False)
    assert (path.parent / "mixed.jsonl").read_text() == "mine"
    with pytest.raises(DataError, match="is one of the inputs"):
        run(path, output=path)
    run(path)


def test_a_full_disk_leaves_nothing_behind(
    write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(record(0))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DataError, match=r"mixed\.jsonl cannot be written: No space left"):
        run(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def ignore(_done: int, _total: int) -> None:
    """Report nothing."""


@pytest.mark.slow
def test_memory_does_not_hold_the_texts(write_jsonl: WriteJsonl) -> None:
    """2,000 records of 10 kB; some 60 bytes of each are kept."""
    path = write_jsonl(*(record(i, note="x" * 10_000) for i in range(2_000)))
    tracemalloc.start()
    run(path, output=path.parent / "once.jsonl", overwrite=False).lines.clear()
    tracemalloc.reset_peak()
    mix_only = MixOptions((str(path),), path.parent / "twice.jsonl", 0)
    mix(mix_only, on_bytes=ignore, on_record=ignore, on_rejected=print)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 5_000_000


# Joining


def joined(*records: dict[str, Any], coins: Iterator[bool] | None = None) -> list[dict[str, Any]]:
    raw = [orjson.dumps(r) for r in records]
    wanted = [True] * len(raw) if coins is None else list(coins)
    return [orjson.loads(line) for line in join(raw, wanted, FieldMap())]


def test_a_chain_keeps_labels_and_categories_and_drops_the_repeated_system_message() -> None:
    first = record(1, "maths", system="Be brief.", labels=[0, 0, 1])
    second = record(2, None, system="Be brief.", labels=[0, 0, 0])
    second["messages"] += record(3)["messages"]
    second["labels"] += [0, 1]
    third = record(4, None, system="Be brief.", labels=[0, 0, 1])
    third["meta"] = {"category_id": 7, "category_name": "code"}
    (made,) = joined(first, second, third)
    assert [m["content"] for m in made["messages"]] == [
        *("Be brief.", "Q1", "A1", "Q2", "A2", "Q3", "A3", "Q4", "A4"),
    ]
    assert made["labels"] == [0, 0, 1, 0, 0, 0, 1, 0, 1]
    code = {"category_id": 7, "category_name": "code"}
    assert made["categories"] == [*["maths"] * 3, *[None] * 4, code, code]
    assert set(made) == {"messages", "labels", "categories"}


def test_a_joined_record_is_read_as_its_parts_were() -> None:
    """The build reads it back: same messages, same labels, each with its own category."""
    two = record(2, "code", labels=[0, 0, 0, 1])
    two["messages"] *= 2
    parts = [record(1, "maths", labels=[0, 1]), two, record(3, "chat")]
    (made,) = joined(*parts[:2])
    read = parse(orjson.dumps(made), FieldMap())
    assert [m.trained for m in read.messages] == [False, True, False, False, False, True]
    names = [m.category.name if m.category else None for m in read.messages]
    assert names == ["maths"] * 2 + ["code"] * 4
    (again,) = joined(made, parts[2])
    assert again["categories"] == [*names, "chat", "chat"]


def test_a_message_that_had_no_label_has_none_after_joining() -> None:
    """Else --train-on labels would train what nobody labelled."""
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Q2"},
            {"from": "gpt", "value": "A2", "loss": 0},
            {"from": "human", "value": "Q3"},
            {"from": "gpt", "value": "A3"},
        ],
        "system": "S",
    }
    (made,) = joined(record(1, system="S"), sharegpt)
    assert "labels" not in made
    assert [m.get("label") for m in made["messages"]] == [None, None, None, None, 0, None, None]


def test_weights_stay_what_they_are_through_joining() -> None:
    listed, inline = record(1, labels=[0, 0.25]), record(2)
    inline["messages"][-1]["weight"] = 3.5
    for parts in ([listed, inline], [listed, record(2)], [record(1), inline]):
        (made,) = joined(*parts)
        read = parse(orjson.dumps(made), FieldMap())
        alone = [parse(orjson.dumps(part), FieldMap()) for part in parts]
        wanted = [(m.trained, m.weight) for one in alone for m in one.messages if m.trained]
        assert [(m.trained, m.weight) for m in read.messages if m.trained] == wanted


SYSTEM_A = record(1, system="a")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SYSTEM_A, record(2, system="b")),
        (SYSTEM_A, record(2)),
        (record(2), SYSTEM_A),
        (record(1), record(1)),  # its own copy
        (record(1), record(2, tools=[{"name": "f"}])),
        (record(1, labels=[0, 0]), record(2)),  # nothing of it is trained
        (record(1) | {"messages": record(1)["messages"] + [{"role": "user", "content": "?"}]},
         record(2)),
        (record(1, pad="x" * 5_000_000), record(2, pad="y" * 5_000_000)),
    ],
)  # fmt: skip
def test_what_does_not_fit_begins_a_chain_of_its_own(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert joined(first, second) == [first, second]


def test_coins_decide_and_the_first_one_has_none_to_join() -> None:
    records = [record(i) for i in range(5)]
    made = joined(*records, coins=iter([True, False, True, True, False]))
    assert [len(r["messages"]) // 2 for r in made] == [1, 3, 1]
    tools = [record(i, tools=[{"name": "f"}]) for i in range(2)]
    assert joined(*tools)[0]["tools"] == [{"name": "f"}]


def test_about_a_share_p_of_the_records_joins_the_one_before(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(*(record(i) for i in range(2_000)))
    ran = run(path, join_probability=0.3)
    assert ran.made.num_written == len(ran.lines) == pytest.approx(1_400, abs=60)
    assert ran.made.turns_drawn == 2_000
    longest = max(len(orjson.loads(line)["messages"]) for line in ran.lines)
    assert longest > 6  # chains, not only pairs
    texts = Counter(m["content"] for line in ran.lines for m in orjson.loads(line)["messages"])
    assert set(texts.values()) == {1}
    assert len(texts) == 4_000
