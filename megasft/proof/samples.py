"""Samples made of random tokens, and small stores of them, without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store

VOCAB: Final = 256


def sample(
    tokens: Sequence[int], *turns: tuple[int, int], weights: Sequence[float] | None = None
) -> Sample:
    """Make a sample with turns given as ``(start, num_tokens)``, and their weights if not 1.

    Example:
        >>> sample([7, 8, 9], (1, 2)).turns.tolist()
        [[1, 2, 0, 0, 1065353216]]
    """
    records = [(start, size, 0, i) for i, (start, size) in enumerate(turns)]
    return Sample(np.array(tokens, np.int32), turn_records(records, weights))


def random_samples(num: int, *, row_tokens: int, seed: int) -> list[Sample]:
    """Make conversations of one or two turns each, now and then a turn of one label.

    A twentieth has no label, some documents are shorter than a share of theirs, one fills its row.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(num):
        size = row_tokens if i == 0 else int(rng.integers(2, 61))
        turns = [(1, 1)] if size < 6 else [(2, int(rng.integers(1, 4)))]
        if size > 12:
            turns.append((8, size - 8))
        tokens = rng.integers(0, VOCAB, size).tolist()
        samples.append(sample(tokens, *(() if i % 20 == 7 else turns)))
    return samples


def weighted(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """Return the samples with random weights of turns, between 0.125 and 8, now and then 1."""
    rng = np.random.default_rng(seed)
    made = []
    for one in samples:
        weights = 2 ** rng.uniform(-3, 3, len(one.turns))
        weights[rng.random(len(weights)) < 0.1] = 1
        made.append(one._replace(turns=turn_records(one.turns[:, :-1].tolist(), weights.tolist())))
    return made


def write_store(
    path: Path, samples: Sequence[Sample], *, vocab_size: int = VOCAB, pad_token: int = 0
) -> TokenStore:
    """Write samples that no tokenizer made, replacing an earlier store."""
    with StoreWriter(path, vocab_size=vocab_size, overwrite=True) as writer:
        for i, one in enumerate(samples):
            writer.add(one, source=0, line=i + 1)
        special = {"pad": pad_token}
        writer.finish(
            {"counts": {}, "special_tokens": special, "sources": [{"path": "made.jsonl"}]}
        )
    return open_store(path)
