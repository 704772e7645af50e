"""Small token stores without a tokenizer, for tests of everything behind the data stage."""

from pathlib import Path

import numpy as np

from megasft.schema import Sample
from megasft.store import StoreWriter, TokenStore, open_store

VOCAB = 256


def sample(tokens: list[int], *turns: tuple[int, int]) -> Sample:
    """A sample with turns given as (start, num_tokens)."""
    records = [(start, size, 0, i) for i, (start, size) in enumerate(turns)]
    return Sample(
        np.array(tokens, dtype=np.int32), np.array(records, dtype=np.int32).reshape(-1, 4)
    )


def write_store(path: Path, samples: list[Sample], *, vocab_size: int = VOCAB) -> TokenStore:
    with StoreWriter(path, vocab_size=vocab_size, overwrite=True) as writer:
        for i, one in enumerate(samples):
            writer.add(one, source=0, line=i + 1)
        writer.finish({"counts": {}, "special_tokens": {}, "sources": [{"path": "made.jsonl"}]})
    return open_store(path)


def random_samples(num: int, *, seed: int, longest: int = 60, vocab: int = VOCAB) -> list[Sample]:
    """Samples of one or two turns, of 6 to ``longest`` tokens; a turn of 1 label now and then."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        size = int(rng.integers(6, longest + 1))
        turns = [(2, int(rng.integers(1, 4)))]
        if size > 12:
            turns.append((8, size - 8))
        made.append(sample(rng.integers(0, vocab, size).tolist(), *turns))
    return made
