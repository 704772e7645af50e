"""What the dataset reads is, bit for bit, what one gets by filling in token after token."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasft.batch.dataset import PackedRows, RowShape
from megasft.schema import Sample, SFTBatch, turn_records
from megasft.store import StoreWriter, TokenStore
from megasft.store_group import open_stores
from tests.unit.batch.row_oracle import DTYPES, micro_batch

ROW_TOKENS = 64


def random_sample(rng: np.random.Generator, *, vocab_size: int, longest: int) -> Sample:
    """Make a sample with any turns it may have: none, touching, up to its last token."""
    size = int(rng.integers(1, longest + 1))
    edges = np.flatnonzero(rng.random(size + 1) < 0.25)
    edges = edges[edges > 0]
    turns = [
        (start, end - start, int(rng.integers(0, 4)), i)
        for i, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        if rng.random() < 0.7
    ]
    tokens = rng.integers(0, vocab_size, size).astype(np.int32)
    return Sample(tokens, turn_records(turns, rng.uniform(0.1, 9, len(turns))))


def write(path: Path, samples: Sequence[Sample], *, vocab_size: int, names: str) -> Path:
    with StoreWriter(path, vocab_size=vocab_size) as writer:
        for i, sample in enumerate(samples):
            writer.add(sample, source=0, line=i + 1)
        writer.finish(
            {
                "counts": {},
                "special_tokens": {},
                "sources": [{"path": "made"}],
                "categories": {str(i + 1): name for i, name in enumerate(names)},
            }
        )
    return path


def random_rows(
    rng: np.random.Generator, store: TokenStore, *, align_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Deal samples into rows in any order; rows may be empty, and a sample may come twice."""
    lengths = -(-store.tokens.lengths // align_tokens) * align_tokens
    rows = []
    for _ in range(6):
        drawn = rng.integers(0, len(store), int(rng.integers(0, 20)))
        rows.append(drawn[np.cumsum(lengths[drawn]) <= ROW_TOKENS])
    return rows


def check(store: TokenStore, *, seed: int, cp_size: int, align_tokens: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, store, align_tokens=align_tokens)
    order = [*range(len(rows)), None, None]
    positions = [int(p) for p in rng.integers(0, len(order), num_rows)]
    wanted = [order[p] for p in positions]
    samples = [[] if r is None else [store.sample(int(i)) for i in rows[r]] for r in wanted]
    for cp_rank in range(cp_size):
        shape = RowShape(ROW_TOKENS, align_tokens, 7, cp_rank=cp_rank, cp_size=cp_size)
        dataset = PackedRows([(store, rows)], order, length=len(order), shape=shape)

        (read,) = dataset.__getitems__(positions)

        ids = {
            "row_ids": np.array([-1 if row is None else row for row in wanted]),
            "set_ids": np.array([-1 if row is None else 0 for row in wanted]),
        }
        expected = micro_batch(samples, shape) | ids
        assert list(read) == list(SFTBatch._fields)
        for name, tensor in read.items():
            assert tensor.is_contiguous()
            assert tensor.numpy().dtype == DTYPES[name], name
            assert tensor.tolist() == expected[name].tolist(), name


@pytest.mark.parametrize("vocab_size", [60_000, 150_000])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    cp_size=st.sampled_from([1, 2, 4]),
    num_stores=st.integers(1, 3),
    num_rows=st.integers(1, 3),
    longest=st.sampled_from([4, 20, 64]),
)
def test_a_micro_batch_is_what_its_samples_say_token_by_token(
    vocab_size: int, seed: int, cp_size: int, num_stores: int, num_rows: int, longest: int
) -> None:
    rng = np.random.default_rng(seed)
    align_tokens = max(2 * cp_size, int(rng.choice([1, 8])))
    with TemporaryDirectory() as folder:
        paths = []
        for number, names in enumerate(("abc", "bca", "dae")[:num_stores]):
            made = [
                random_sample(rng, vocab_size=vocab_size, longest=longest)
                for _ in range(int(rng.integers(1, 8)))
            ]
            path = Path(folder) / f"store{number}"
            paths.append(write(path, made, vocab_size=vocab_size, names=names))
        check(
            open_stores(paths),
            seed=seed,
            cp_size=cp_size,
            align_tokens=align_tokens,
            num_rows=num_rows,
        )


def test_a_micro_batch_of_padding_alone_holds_nothing_to_train(tmp_path: Path) -> None:
    made = [Sample(np.array([3, 4], np.int32), turn_records([(1, 1, 2, 0)]))]
    store = open_stores([write(tmp_path / "store", made, vocab_size=100, names="ab")])
    shape = RowShape(row_tokens=8, align_tokens=2, pad_token=9)
    rows = PackedRows([(store, [np.array([0])])], [None, 0], length=2, shape=shape)

    padding, one = rows[0], rows[1]

    assert padding["tokens"].tolist() == [9] * 8
    assert not padding["turn_tokens"].any()
    assert padding["cu_seqlens"].tolist() == [0, 8]
    assert padding["row_ids"].tolist() == padding["set_ids"].tolist() == [-1]
    assert one["labels"].tolist() == [4, 0, 0, 0, 0, 0, 0, 0]
    assert one["category_ids"].tolist() == [2, 0, 0, 0, 0, 0, 0, 0]
