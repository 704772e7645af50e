"""Which row is trained at which step: a pure function of the plan, the seed and one integer.

Megatron counts the rows it has consumed; that integer is the whole state. Position ``k`` of the run
belongs to epoch ``k // R``, and each epoch has its own permutation of the rows. So resuming, on any
number of ranks, repeats and skips nothing.

Rows of a curriculum lie stage after stage in the plan and are permuted within their stage only, so
every epoch goes through all stages. A stage to be seen twice before the next one comes is drawn
twice (``sample_rate: 2``): an order that repeats some epochs would need a second integer.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt


class RowAtPosition(Protocol):
    """Which row of the plan a run trains at a position."""

    def __getitem__(self, position: int) -> int: ...


class RowOrder:
    """The endless sequence of rows of a run; remembers the permutations of two epochs.

    Args:
        num_rows: Rows of the plan.
        seed: Of the permutations.
        shuffle: Whether to permute at all.
        stages: Row at which each stage starts, and where the last ends; one stage if not given.

    Example:
        >>> order = RowOrder(num_rows=3, seed=1)
        >>> sorted(order[k] for k in range(3, 6))
        [0, 1, 2]
    """

    def __init__(
        self,
        *,
        num_rows: int,
        seed: int,
        shuffle: bool = True,
        stages: Sequence[int] | None = None,
    ) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self.stages = (0, num_rows) if stages is None else tuple(stages)
        assert (self.stages[0], self.stages[-1]) == (0, num_rows), self.stages
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if not self.shuffle:
            return place
        if epoch not in self._epochs:
            # A global batch can straddle an epoch's edge, so the one before is kept.
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            rng = np.random.default_rng([self.seed, epoch])
            within = [a + rng.permutation(b - a) for a, b in pairwise(self.stages)]
            self._epochs[epoch] = np.concatenate(within)
        return int(self._epochs[epoch][place])
