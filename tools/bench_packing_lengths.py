"""Sample lengths that packers are compared on, and what a document of a Llama 3 8B costs.

Each set is deterministic by its seed. The cost weighs attention by 1.3, what its kernels lose
against plain products; the deal of ``megasft.packing.balance`` does not know this model.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
SHORTEST: Final = 16


class LengthSet(NamedTuple):
    """Samples and the rows they go into.

    Attributes:
        make: From a generator to the tokens of each sample.
        row_tokens: Capacity of a row.
        seed: Used when no other is asked for.
    """

    make: Callable[[np.random.Generator], Lengths]
    row_tokens: int
    seed: int

    def lengths(self, seed: int | None = None) -> Lengths:
        """Return int64 [S], the tokens of each sample."""
        return self.make(np.random.default_rng(self.seed if seed is None else seed))


def cost(lengths: Lengths) -> npt.NDArray[np.float64]:
    """Return the operations of training on documents of these lengths, forward and backward."""
    return 6 * 7.5e9 * lengths + 1.3 * 6 * 32 * 4096 * lengths.astype(np.float64) ** 2


def reasoning(rng: np.random.Generator) -> Lengths:
    """Long single-turn answers: log-normal around 1,500, cut at 20,000."""
    return np.clip(_log_normal(rng, 1500, 0.75, 110_000), SHORTEST, 20_000)


def chat(rng: np.random.Generator) -> Lengths:
    """Short conversations: log-normal around 350, cut at the row."""
    return np.clip(_log_normal(rng, 350, 0.9, 1_000_000), 8, 4096)


def heavy_tail(rng: np.random.Generator) -> Lengths:
    """Four fifths log-normal around 800, a fifth Pareto from 2,000 on, cut at the row."""
    short = np.exp(rng.normal(np.log(800), 1.0, 40_000))
    return _shuffled(rng, [short, (rng.pareto(1.1, 10_000) + 1) * 2000], 32_768)


def long_context(rng: np.random.Generator) -> Lengths:
    """Nineteen of twenty log-normal around 1,000, the others Pareto from 8,000 up to a row."""
    short = np.exp(rng.normal(np.log(1000), 0.8, 57_000))
    return _shuffled(rng, [short, (rng.pareto(0.9, 3_000) + 1) * 8000], 131_072)


def _log_normal(rng: np.random.Generator, median: int, sigma: float, num: int) -> Lengths:
    return np.exp(rng.normal(np.log(median), sigma, num)).astype(np.int64)


def _shuffled(
    rng: np.random.Generator, parts: list[npt.NDArray[np.float64]], row_tokens: int
) -> Lengths:
    lengths = np.clip(np.concatenate(parts).astype(np.int64), SHORTEST, row_tokens)
    rng.shuffle(lengths)
    return lengths


LENGTH_SETS: Final = {
    "chat_1m": LengthSet(chat, 4096, 1),
    "reasoning_110k": LengthSet(reasoning, 131_072, 0),
    "heavy_tail_50k": LengthSet(heavy_tail, 32_768, 2),
    "long_context_60k": LengthSet(long_context, 131_072, 3),
}
