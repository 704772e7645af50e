"""Weights of turns in stores: written, read, read as 1, and stores of before."""

from pathlib import Path

import numpy as np
import orjson
import pytest

from megasft.errors import StoreError
from megasft.packing.plan import plan_rows
from megasft.schema import Sample, turn_records, turn_weights_of
from megasft.store import StoreWriter, TokenStore, open_store
from megasft.store_group import open_stores, population_of
from megasft.turn_records import WeightRange
from tests.old_stores import META, PLAN, TURNS, write_version_1

WEIGHTS = [[1.0, 0.25], [], [3.0]]


def write(path: Path, weights: list[list[float]], *, category: int = 2) -> Path:
    with StoreWriter(path, vocab_size=100) as writer:
        for line, own in enumerate(weights, start=1):
            turns = [(1 + 2 * n, 1, category, n) for n in range(len(own))]
            tokens = np.full(2 + 2 * len(own), line, np.int32)
            writer.add(Sample(tokens, turn_records(turns, own)), source=0, line=line)
        same = {name: META[name] for name in ("tokenizer", "special_tokens", "counts", "sources")}
        writer.finish({**same, "categories": {str(category): "maths"}})
    return path


def weights_in(store: TokenStore) -> list[list[float]]:
    return [turn_weights_of(store.sample(i).turns).tolist() for i in range(len(store))]


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "store", WEIGHTS))

    assert weights_in(store) == WEIGHTS
    together = store.samples(np.array([2, 0, 1]))
    assert turn_weights_of(together.turns).tolist() == [3.0, 1.0, 0.25]
    assert store.weights == WeightRange(turns=2, least=0.25, most=3.0)
    assert store.has_weights
    assert orjson.loads((store.path / "store.json").read_bytes())["format_version"] == 2


def test_a_store_of_ones_has_no_weights(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "store", [[1.0, 1.0], [], [1.0]]))
    assert store.weights is None and not store.has_weights


def test_other_weights_are_another_fingerprint(tmp_path: Path) -> None:
    prints = {
        open_store(write(tmp_path / str(n), [[w]])).fingerprint
        for n, w in enumerate([1.0, 0.5, 0.5])
    }
    assert len(prints) == 2


def test_a_store_of_format_version_1_is_read_as_weights_of_1(tmp_path: Path) -> None:
    store = open_store(write_version_1(tmp_path / "old"))

    assert (len(store), store.fingerprint) == (3, META["fingerprint"])
    assert [store.sample(i).tokens.tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 3, 3, 9]]
    assert [store.sample(i).turns[:, :4].tolist() for i in range(3)] == TURNS
    assert weights_in(store) == [[1.0], [], [1.0, 1.0]]
    assert store.weights is None
    assert store.turns.lengths.tolist() == [5, 0, 10]
    assert store.turns.offsets.tolist() == [0, 5, 5, 15]
    assert store.turns.values.reshape(-1, 5)[:, :4].tolist() == [t for own in TURNS for t in own]
    read = store.samples(np.array([2, 1, 0]))
    assert (read.turns[:, 0].tolist(), read.num_turns.tolist()) == ([1, 3, 1], [2, 0, 1])
    assert store.samples(np.zeros(0, np.int64)).turns.shape == (0, 5)
    assert store.source_line(2) == "old.jsonl:12"


def test_a_plan_of_an_old_store_is_the_one_its_checkpoints_name(tmp_path: Path) -> None:
    store = open_store(write_version_1(tmp_path / "old"))
    plan = plan_rows(store, row_tokens=8, align_tokens=2, seed=3)
    assert plan.identity == PLAN
    assert (plan.rows.samples.tolist(), plan.rows.borders.tolist()) == ([2, 0, 1], [0, 2, 3])
    assert (plan.turns.tolist(), plan.labels.tolist()) == ([3, 0], [4, 0])


def test_old_and_new_stores_are_read_as_one(tmp_path: Path) -> None:
    old = write_version_1(tmp_path / "old")
    new = write(tmp_path / "new", [[4.0, 1.0]], category=3)

    for paths in ([old, new], [new, old]):
        both = open_stores(paths)
        order = [0, 1, 2, 3] if paths[0] == old else [1, 2, 3, 0]
        wanted = [[1.0], [], [1.0, 1.0], [4.0, 1.0]]
        assert [weights_in(both)[i] for i in order] == wanted
        assert both.weights == WeightRange(turns=1, least=1.0, most=4.0)
        together = both.samples(np.array(order))
        assert turn_weights_of(together.turns).tolist() == [1.0, 1.0, 1.0, 4.0, 1.0]
        assert [int(population_of(both).category_of[i]) for i in order][2:] == [both_id(both)] * 2


def both_id(store: TokenStore) -> int:
    """The id of the one category both stores name."""
    (number,) = store.meta["categories"]
    return int(number)


def test_a_store_can_be_read_without_its_weights(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "store", WEIGHTS))

    plain = store.without_weights()

    assert weights_in(plain) == [[1.0, 1.0], [], [1.0]]
    assert not plain.has_weights and plain.weights == store.weights, "it can still be named"
    assert plain.turns.lengths.tolist() == store.turns.lengths.tolist()
    assert plain.sample(0).turns[:, :4].tolist() == store.sample(0).turns[:, :4].tolist()
    assert weights_in(store) == WEIGHTS
    assert plain.fingerprint == store.fingerprint, "rows do not depend on weights"


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_a_version_nobody_knows_is_refused(tmp_path: Path, version: object) -> None:
    path = write_version_1(tmp_path / "old")
    (path / "store.json").write_bytes(orjson.dumps(META | {"format_version": version}))
    with pytest.raises(StoreError, match=rf"format version {version}, this megasft reads 1 and 2"):
        open_store(path)
