"""Small random samples for tests of everything behind the data stage."""

import numpy as np

from megasft.proof.samples import VOCAB, sample, write_store
from megasft.schema import Sample

__all__ = ["VOCAB", "random_samples", "sample", "write_store"]


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
