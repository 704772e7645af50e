"""Stock Megatron reads our stores: the .idx bytes are written here by hand, with numpy."""

from pathlib import Path

import numpy as np
import pytest

from tests.stores import random_samples, sample, write_store


@pytest.mark.parametrize("vocab_size", [256, 65_499, 65_500, 150_000])
def test_megatrons_indexed_dataset_reads_the_same_tokens_and_turns(
    tmp_path: Path, vocab_size: int
) -> None:
    """Mirrors ``IndexedDataset`` of megatron-core 0.19.2, both token widths."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    highest = sample([0, vocab_size - 1, 1], (1, 1))
    samples = [*random_samples(20, seed=0), highest, sample([5, 6])]
    write_store(tmp_path / "store", samples, vocab_size=vocab_size)

    tokens = IndexedDataset(str(tmp_path / "store" / "tokens"))
    turns = IndexedDataset(str(tmp_path / "store" / "turns"))

    assert len(tokens) == len(turns) == len(samples) == 22
    assert tokens.index.dtype == DType.optimal_dtype(vocab_size)
    assert tokens.document_indices.tolist() == list(range(23))
    for i, expected in enumerate(samples):
        assert np.array_equal(tokens[i], expected.tokens)
        assert np.array_equal(turns[i], expected.turns.reshape(-1))
