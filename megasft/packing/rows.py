"""What every packer returns, and the few steps all of them share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megasft.errors import PlanError

Seed = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """Which samples make which row.

    Attributes:
        samples: int64 [placed]. Sample indices, row after row.
        borders: int64 [R + 1]. Where each row starts in ``samples``.
    """

    samples: npt.NDArray[np.int64]
    borders: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        return self.samples[self.borders[row] : self.borders[row + 1]]


class Packer(Protocol):
    """How samples become rows."""

    def __call__(
        self,
        lengths: npt.NDArray[np.int64],
        *,
        row_tokens: int,
        align_tokens: int = 1,
        seed: Seed = 0,
    ) -> Rows:
        """Pack samples into rows.

        Args:
            lengths: int64 [S]. Tokens of each sample; all within ``[1, row_tokens]`` when aligned.
            row_tokens: Capacity of a row.
            align_tokens: Each sample takes a multiple of this many tokens.
            seed: Decides where there is a choice between like samples.

        Returns:
            Every sample exactly once; no row is empty.

        Raises:
            PlanError: A sample, padded to the alignment, is longer than a row or empty.
        """
        ...


def aligned(
    lengths: npt.NDArray[np.int64], *, row_tokens: int, align_tokens: int
) -> npt.NDArray[np.int64]:
    """Return what each sample takes of a row.

    Raises:
        PlanError: A sample, padded to the alignment, is longer than a row or empty.
    """
    padded = -(-lengths // align_tokens) * align_tokens
    if len(lengths) and (padded.max() > row_tokens or lengths.min() < 1):
        worst = int(np.argmax(padded)) if padded.max() > row_tokens else int(np.argmin(lengths))
        raise PlanError(
            f"sample {worst} has {int(lengths[worst])} tokens ({int(padded[worst])} when aligned "
            f"to {align_tokens}) and cannot be placed in a row of {row_tokens}"
        )
    return padded


def longest_first(padded: npt.NDArray[np.int64], *, seed: Seed) -> npt.NDArray[np.int64]:
    """Return the samples from the longest to the shortest, equally long ones at random."""
    shuffled = np.random.default_rng(seed).permutation(len(padded))
    return shuffled[np.argsort(-padded[shuffled], kind="stable")]


def gather(samples: npt.NDArray[np.int64], row_of_sample: npt.NDArray[np.int64]) -> Rows:
    """Collect the samples of each row; within a row they stay in the order given."""
    order = np.argsort(row_of_sample, kind="stable")
    counts = np.bincount(row_of_sample) if len(row_of_sample) else np.zeros(0, np.int64)
    assert counts.all(), "a row without a sample"
    return Rows(samples[order], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
