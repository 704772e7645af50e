"""What a mixture file may say, and which samples are drawn for it."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasft.draw import Draw, Population, draw
from megasft.errors import DataError
from megasft.mixture import Mixture, Part, read_mixture

Write = Callable[..., Mixture]

OPENSFT = {
    "data_name": "demo",
    "data_path": "raw/demo.jsonl",
    "ratio": [
        {"category_id": 1, "category_name": "maths", "size": 10, "sample_rate": 2.3},
        {"category_id": 2, "category_name": "", "size": 20, "sample_rate": 0.8},
    ],
}


@pytest.fixture
def read(tmp_path: Path) -> Write:
    def write_and_read(content: str | dict[str, Any], name: str = "mixture.yaml") -> Mixture:
        path = tmp_path / name
        text = content if isinstance(content, str) else orjson.dumps(content).decode()
        path.write_text(text)
        return read_mixture(path)

    return write_and_read


def population(
    categories: Sequence[int],
    *,
    sources: Sequence[int] | None = None,
    files: Sequence[tuple[str, ...]] = (("a.jsonl",), ("b.jsonl.gz", "folder")),
    names: dict[int, str] | None = None,
) -> Population:
    """A population of samples with these categories, all of the first source if not said."""
    of = [0] * len(categories) if sources is None else sources
    named = {1: "maths", 2: "code", 3: "chat"} if names is None else names
    return Population(np.array(of, np.int32), np.array(categories, np.int32), files, named)


def drawn(mixture: Mixture, found: Population, seed: int = 0) -> list[list[int]]:
    """The samples of each stage, sorted."""
    return [sorted(stage.samples.tolist()) for stage in draw(mixture, found, seed=seed).stages]


def mixture_of(*parts: Part, **fields: Any) -> Mixture:
    return Mixture(Path("m.yaml"), parts, **fields)


# What a file says


def test_yaml_and_json_say_the_same(read: Write) -> None:
    yaml = """
seed: 7
rest: drop
parts:
  - {source: a.jsonl, category: maths, sample_rate: 2.3, max_samples: 5}
  - category: 3
"""
    said = {
        "seed": 7,
        "rest": "drop",
        "parts": [
            {"source": "a.jsonl", "category": "maths", "sample_rate": 2.3, "max_samples": 5},
            {"category": 3},
        ],
    }
    mixture = read(yaml)
    assert mixture == read(said)
    assert mixture.parts[0] == Part(
        "a.jsonl, category maths", "a.jsonl", "maths", None, Fraction(23, 10), None, 5
    )
    assert mixture.parts[1].category_id == 3
    assert (mixture.seed, mixture.rest, mixture.curriculum) == (7, "drop", "mixed")


def test_opensfts_file_is_read_as_it_is(read: Write) -> None:
    mixture = read(OPENSFT, name="ratio.json")
    first, second = mixture.parts
    assert (first.category, first.category_id, first.size) == ("maths", 1, 10)
    assert (second.category, second.category_id, second.sample_rate) == ("", 2, Fraction(4, 5))
    assert mixture.inputs() == ["raw/demo.jsonl"]


def test_inputs_are_looked_for_here_and_then_beside_the_file(
    read: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    mixture = read({"parts": [{"source": "x.jsonl"}, {"source": "y.jsonl"}, {"source": "x.jsonl"}]})
    (tmp_path / "x.jsonl").touch()
    assert mixture.inputs() == [str(tmp_path / "x.jsonl"), "y.jsonl"]
    with pytest.raises(DataError, match="1 of its 2 parts have no source"):
        read({"parts": [{"source": "x.jsonl"}, {"category": 1}]}).inputs()


ONE = [{"category": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must be keys and values"),
        ("parts: [", "is neither JSON nor YAML"),
        ('{"parts": ', "is neither JSON nor YAML"),
        ({}, "needs one list of parts"),
        ({"parts": [], "seed": 1}, "needs one list of parts"),
        ({"parts": ONE, "ratio": ONE}, "needs one list of parts"),
        ({"parts": ONE, "sede": 1}, "has sede; known are seed"),
        ({"parts": [{"category": 1, "rate": 2}]}, "part 1 has rate; known are source"),
        ({"parts": [{"sample_rate": 2}]}, "part 1 chooses nothing"),
        ({"parts": [3]}, "part 1 must be keys and values, and is 3"),
        ({"parts": [{"category": True}]}, "category must be a text, and is True"),
        ({"parts": [{"category": 1, "category_id": 1}]}, "category beside category_id"),
        ({"parts": [{"category": 1, "sample_rate": "2"}]}, "sample_rate must be a number"),
        ({"parts": [{"category": 1, "sample_rate": -1}]}, "sample_rate must be a number >= 0"),
        ("parts: [{category: 1, sample_rate: .inf}]", "sample_rate must be a number"),
        ({"parts": [{"category": 1, "max_samples": 0}]}, "max_samples must be an integer >= 1"),
        ({"parts": [{"category": 1, "specialised": 1}]}, "specialised must be true or false"),
        ({"parts": ONE, "seed": -1}, "seed must be an integer >= 0"),
        ({"parts": ONE, "rest": "ignore"}, "rest must be error, keep, drop"),
        ({"parts": [{"category": 1, "weight": 1, "sample_rate": 1}]}, "both sample_rate and wei"),
        ({"parts": [*ONE, {"category": 2, "weight": 1}]}, "missing for category .1."),
        ({"parts": [{"category": 2, "weight": 0}]}, "all weights are 0"),
        ({"parts": [{"category": 2, "weight": 1}], "rest": "keep"}, "that have no weight"),
        ({"parts": ONE, "total": 5}, "total has no effect without weights"),
        ({"parts": ONE, "replay": 0}, "replay has no effect with curriculum: mixed"),
        ({"parts": [{"category": 1, "specialised": True}]}, "specialised has no effect"),
        ({"parts": ONE, "curriculum": "two-stage"}, "two-stage needs replay"),
        ({"parts": ONE, "curriculum": "two-stage", "replay": 1}, "0 of 1 have it"),
        ({"parts": ONE, "curriculum": "spiral"}, "curriculum must be mixed, sequential"),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_place(
    read: Write, content: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml cannot be read: No such file"):
        read_mixture(tmp_path / "none.yaml")


# What is drawn


@given(
    st.integers(1, 200),
    st.one_of(st.floats(0.01, 4), st.sampled_from([0.5, 1.0, 2.0, 2.3])),
    st.integers(0, 5),
)
def test_each_sample_is_drawn_floor_or_ceil_of_the_rate_and_the_total_is_exact(
    num: int, rate: float, seed: int
) -> None:
    exact = Fraction(str(rate))
    total = floor(exact * num + Fraction(1, 2))
    part = Part("maths", category="maths", sample_rate=exact)
    found = population([1] * num + [2] * 9)
    mixture = mixture_of(part, rest="drop")
    if total == 0:
        with pytest.raises(DataError, match="draws none"):
            draw(mixture, found, seed=seed)
        return
    (samples,) = drawn(mixture, found, seed)
    times = np.bincount(samples, minlength=num)
    assert len(samples) == total
    assert len(times) == num  # nothing of another category
    assert set(times.tolist()) <= {floor(exact), ceil(exact)}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 500)),
)
def test_weights_are_shares_of_the_total_and_lose_no_sample(
    parts: list[tuple[int, int]], total: int | None
) -> None:
    found = population([i for i, (num, _) in enumerate(parts, start=1) for _ in range(num)])
    weighted = [
        Part(str(i), category_id=i, weight=Fraction(weight))
        for i, (_, weight) in enumerate(parts, start=1)
    ]
    made = draw(mixture_of(*weighted, total=total), found, seed=1)
    whole = total or len(found)
    assert sum(part.drawn for part in made.parts) == len(made.stages[0].samples) == whole
    for part, (_, weight) in zip(made.parts, parts, strict=True):
        assert abs(part.drawn - whole * weight / sum(w for _, w in parts)) < 1


def test_the_draw_of_a_part_depends_on_seed_and_part_alone() -> None:
    found = population([1] * 50 + [2] * 50)
    maths = Part("maths", category="maths", sample_rate=Fraction(1, 2))
    code = Part("code", category="code", sample_rate=Fraction(1, 2))

    def of_maths(made: Draw) -> list[int]:
        return [i for i in made.stages[0].samples.tolist() if i < 50]

    alone = of_maths(draw(mixture_of(maths, rest="drop"), found, seed=3))
    beside = of_maths(draw(mixture_of(code, maths), found, seed=3))
    other_seed = of_maths(draw(mixture_of(maths, rest="drop"), found, seed=4))
    own_seed = of_maths(draw(mixture_of(maths, rest="drop", seed=3), found, seed=4))
    assert len(alone) == 25
    assert alone == beside == own_seed != other_seed
    in_code = [i - 50 for i in drawn(mixture_of(code, rest="drop"), found, 3)[0]]
    assert in_code != alone  # parts do not share a stream


def test_a_cap_cuts_what_a_rate_or_a_weight_gives_and_nobody_else_gets_it() -> None:
    found = population([1] * 10 + [2] * 10)
    rates = [
        Part("maths", category="maths", sample_rate=Fraction(3), max_samples=12),
        Part("code", category="code"),
    ]
    assert [p.drawn for p in draw(mixture_of(*rates), found, seed=0).parts] == [12, 10]
    weights = [
        Part("maths", category="maths", weight=Fraction(1), max_samples=3),
        Part("code", category="code", weight=Fraction(1)),
    ]
    assert [p.drawn for p in draw(mixture_of(*weights), found, seed=0).parts] == [3, 10]


def test_samples_in_no_part_are_an_error_kept_once_or_dropped() -> None:
    found = population([1, 2, 0, 3])
    maths = Part("maths", category="maths", sample_rate=Fraction(2))
    with pytest.raises(DataError, match=r"3 of 4 .* \(categories \(none\), code, chat; sources a"):
        draw(mixture_of(maths), found, seed=0)
    assert drawn(mixture_of(maths, rest="drop"), found) == [[0, 0]]
    kept = draw(mixture_of(maths, rest="keep"), found, seed=0)
    assert sorted(kept.stages[0].samples.tolist()) == [0, 0, 1, 2, 3]
    assert kept.parts[1] == ("in no part (keep)", 3, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", [0, 1]),
        ("a", [0, 1]),
        ("./a.jsonl", [0, 1]),
        ("folder", [2, 3, 4]),
        ("b", [2]),
        ("b.jsonl.gz", [2]),
        ("deep/c.parquet", [3, 4]),
        ("c", [3, 4]),
    ],
)
def test_a_source_is_named_by_its_path_its_name_or_what_it_belongs_to(
    name: str, expected: list[int]
) -> None:
    files = (("a.jsonl",), ("folder/b.jsonl.gz", "folder"), ("deep/c.parquet", "folder"))
    found = population([0] * 5, sources=[0, 0, 1, 2, 2], files=files)
    assert drawn(mixture_of(Part("x", source=name), rest="drop"), found) == [expected]


def test_a_source_name_of_two_files_is_refused_and_a_path_is_not() -> None:
    found = population([1, 1], sources=[0, 1], files=(("x/a.jsonl",), ("y/a.jsonl",)))
    with pytest.raises(DataError, match=r"source a is x/a\.jsonl, y/a\.jsonl; write the path"):
        draw(mixture_of(Part("a", source="a"), rest="drop"), found, seed=0)
    assert drawn(mixture_of(Part("a", source="y/a.jsonl"), rest="drop"), found) == [[1]]


def test_a_category_is_found_by_name_before_its_id_and_a_contradiction_is_refused() -> None:
    found = population([1, 2, 5], names={1: "maths", 2: "code", 5: "5"})
    renumbered = draw(mixture_of(Part("c", category="code", category_id=7), rest="drop"), found,
                      seed=0)  # fmt: skip
    assert renumbered.stages[0].samples.tolist() == [1]
    assert "category code is 7 there and 2 in the data" in renumbered.warnings[0]
    unnamed = mixture_of(Part("u", category="chat", category_id=5), rest="drop")
    assert drawn(unnamed, found) == [[2]]
    with pytest.raises(DataError, match="category 1 is chat there and maths in the data"):
        draw(mixture_of(Part("x", category="chat", category_id=1), rest="drop"), found, seed=0)
    with pytest.raises(DataError, match="no sample has category chat; there are maths, code, 5"):
        draw(mixture_of(Part("x", category="chat"), rest="drop"), found, seed=0)


def test_category_0_is_that_of_samples_without_one() -> None:
    found = population([0, 1, 0])
    part = Part("rest", category="misc", category_id=0)
    assert drawn(mixture_of(part, rest="drop"), found) == [[0, 2]]


def test_a_size_other_than_found_is_a_warning_and_nothing_found_an_error(read: Write) -> None:
    mixture = read(OPENSFT)
    made = draw(mixture, population([1] * 9 + [2] * 20), seed=0)
    assert [part.drawn for part in made.parts] == [21, 16]  # 2.3 x 9 = 20.7
    (warning,) = made.warnings
    assert "category maths (1) has size 10, and 9 samples are found" in warning
    with pytest.raises(DataError, match=r"category \(2\) finds none of 9 samples"):
        draw(mixture, population([1] * 9), seed=0)
    wanted = {"category_id": 2, "category_name": "", "size": 3, "sample_rate": 0}
    without = read(OPENSFT | {"ratio": [OPENSFT["ratio"][0], wanted]})
    assert len(drawn(without, population([1] * 9))[0]) == 21


def test_a_sample_in_two_parts_is_refused_unless_they_are_two_stages() -> None:
    found = population([1, 1, 2], sources=[0, 1, 1])
    parts = (Part("maths", category="maths"), Part("b", source="b"))
    with pytest.raises(DataError, match=r"1 samples are in two parts \(maths; b\)"):
        draw(mixture_of(*parts), found, seed=0)
    assert drawn(mixture_of(*parts, curriculum="sequential"), found) == [[0, 1], [1, 2]]


# Stages


def test_sequential_trains_part_after_part_and_the_rest_last() -> None:
    found = population([1, 2, 1, 3, 2])
    parts = (Part("code", category="code"), Part("maths", category="maths"))
    made = draw(mixture_of(*parts, curriculum="sequential", rest="keep"), found, seed=0)
    assert [stage.name for stage in made.stages] == ["code", "maths", "in no part (keep)"]
    assert [sorted(stage.samples.tolist()) for stage in made.stages] == [[1, 4], [0, 2], [3]]


def test_two_stages_train_the_specialised_first_and_some_of_them_again_with_the_rest() -> None:
    found = population([1] * 10 + [2] * 6 + [3] * 4)
    parts = (
        Part("chat", category="chat"),
        Part("maths", category="maths", specialised=True),
    )
    mixture = mixture_of(*parts, curriculum="two-stage", replay=Fraction("0.25"), rest="keep")
    made = draw(mixture, found, seed=0)
    first, second = (sorted(stage.samples.tolist()) for stage in made.stages)
    assert first == list(range(10))
    assert [i for i in second if i >= 10] == list(range(10, 20))
    again = [i for i in second if i < 10]
    assert len(set(again)) == len(again) == 3  # 2.5, halves up
    assert [(p.name, p.drawn) for p in made.parts[:2]] == [("chat", 4), ("maths", 13)]


def test_the_identity_is_that_of_the_samples_and_the_curriculum() -> None:
    found = population([1, 1, 2, 2])
    once = (Part("maths", category="maths"), Part("code", category="code"))
    by_source = (Part("everything", source="a"),)
    same = [draw(mixture_of(*p), found, seed=s) for p, s in ((once, 0), (by_source, 5))]
    assert same[0].identity == same[1].identity
    staged = draw(mixture_of(*once, curriculum="sequential"), found, seed=0)
    fewer = draw(mixture_of(once[0], rest="drop"), found, seed=0)
    assert len({same[0].identity, staged.identity, fewer.identity}) == 3
    assert ", " not in staged.identity  # a plan's identity is split there
