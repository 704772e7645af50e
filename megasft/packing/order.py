"""Which row is trained at which step: a pure function of the plan, the seed and one integer.

Megatron counts the rows it has consumed; that integer is the whole state. Position ``k`` of the run
belongs to epoch ``k // R``, and each epoch has its own permutation of the rows. So resuming, on any
number of ranks, repeats and skips nothing.
"""

import numpy as np
import numpy.typing as npt


class RowOrder:
    """The endless sequence of rows of a run; remembers the permutations of two epochs.

    Example:
        >>> order = RowOrder(num_rows=3, seed=1)
        >>> sorted(order[k] for k in range(3, 6))
        [0, 1, 2]
    """

    def __init__(self, *, num_rows: int, seed: int, shuffle: bool = True) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if not self.shuffle:
            return place
        if epoch not in self._epochs:
            # A global batch can straddle an epoch's edge, so the one before is kept.
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            rng = np.random.default_rng([self.seed, epoch])
            self._epochs[epoch] = rng.permutation(self.num_rows)
        return int(self._epochs[epoch][place])
