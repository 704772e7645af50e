from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megasft.data.gradient_mass import (
    WEIGHTINGS,
    Mass,
    MassRow,
    mass_by_category,
    mass_by_sample_length,
    mass_by_turn_length,
)
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store

Turn = tuple[int, int, int]  # start, labels, category


def made(
    path: Path, *samples: tuple[int, list[Turn]], weights: Iterable[list[float] | None] = ()
) -> TokenStore:
    """A store of samples given as their length and turns."""
    with StoreWriter(path, vocab_size=100) as writer:
        for (length, turns), own in zip_longest(samples, weights):
            records = turn_records([(*t, 0) for t in turns], own)
            writer.add(Sample(np.ones(length, np.int32), records), source=0, line=1)
        writer.finish({"categories": {"1": "math", "2": "chat"}, "counts": {}, "sources": []})
    return open_store(path)


def test_shares_of_four_turns_can_be_checked_by_eye(tmp_path: Path) -> None:
    # math: one sample with one turn of 6 labels; chat: one sample with turns of 1 and 2;
    # a third sample has one turn of 1 label and no category.
    store = made(
        tmp_path / "store",
        (8, [(2, 6, 1)]),
        (8, [(1, 1, 2), (4, 2, 2)]),
        (3, [(1, 1, 0)]),
    )
    assert mass_by_category(store) == [
        MassRow("(none)", 1, 1, Mass(Fraction(1, 10), Fraction(1, 3), Fraction(1, 4))),
        MassRow("math", 1, 6, Mass(Fraction(6, 10), Fraction(1, 3), Fraction(1, 4))),
        MassRow("chat", 2, 3, Mass(Fraction(3, 10), Fraction(1, 3), Fraction(2, 4))),
    ]
    assert mass_by_sample_length(store) == [
        MassRow("2 – 3", 1, 1, Mass(Fraction(1, 10), Fraction(1, 3), Fraction(1, 4))),
        MassRow("8 – 15", 3, 9, Mass(Fraction(9, 10), Fraction(2, 3), Fraction(3, 4))),
    ]
    assert mass_by_turn_length(store) == [
        MassRow("1", 2, 2, Mass(Fraction(2, 10), Fraction(1, 3) + Fraction(1, 9), Fraction(2, 4))),
        MassRow("2 – 3", 1, 2, Mass(Fraction(2, 10), Fraction(2, 9), Fraction(1, 4))),
        MassRow("4 – 7", 1, 6, Mass(Fraction(6, 10), Fraction(1, 3), Fraction(1, 4))),
    ]


def test_shares_equal_a_sum_label_by_label_and_add_up_to_exactly_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples: list[tuple[int, list[Turn]]] = []
    for _ in range(60):
        turns, end = [], 1
        for _ in range(int(rng.integers(0, 5))):  # categories differ inside a sample, too
            num = int(rng.integers(1, 40))
            turns.append((end + 1, num, int(rng.integers(0, 3))))
            end += 1 + num
        samples.append((end + 1, turns))
    assert any(not turns for _, turns in samples)
    store = made(tmp_path / "store", *samples)

    weights: dict[int, list[Fraction]] = defaultdict(lambda: [Fraction(0)] * 3)
    for _, turns in samples:
        sample_labels = sum(num for _, num, _ in turns)
        for _, num, category in turns:
            for _label in range(num):
                for k, weight in enumerate((1, Fraction(1, sample_labels), Fraction(1, num))):
                    weights[category][k] += weight
    total = [sum(w[k] for w in weights.values()) for k in range(3)]

    rows = mass_by_category(store)
    assert [r.shares for r in rows] == [
        Mass(*(w / t for w, t in zip(weights[i], total, strict=True))) for i in range(3)
    ]
    assert len({r.shares.token for r in rows} | {r.shares.turn for r in rows}) == 6
    for table in (rows, mass_by_sample_length(store), mass_by_turn_length(store)):
        for weighting in WEIGHTINGS:
            assert sum(getattr(r.shares, weighting) for r in table) == 1


def test_a_turn_of_half_the_weight_has_half_its_share(tmp_path: Path) -> None:
    store = made(
        tmp_path / "store",
        *((8, [(2, 6, 1)]), (8, [(1, 1, 2), (4, 2, 2)])),
        weights=([1.5], [3.0, 0.75]),
    )
    # token: 9 | 3 + 1.5; sample: 1.5 | 1 + 0.5; turn: 1.5 | 3 + 0.75
    assert mass_by_category(store) == [
        MassRow("math", 1, 6, Mass(Fraction(2, 3), Fraction(1, 2), Fraction(2, 7))),
        MassRow("chat", 2, 3, Mass(Fraction(1, 3), Fraction(1, 2), Fraction(5, 7))),
    ]


def test_a_store_in_which_nothing_is_trained_has_no_shares(tmp_path: Path) -> None:
    store = made(tmp_path / "store", (8, []))
    assert mass_by_category(store) == mass_by_sample_length(store) == []
    assert mass_by_turn_length(store) == []
