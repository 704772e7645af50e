"""Rows of like cost in the same global batch, by sorting a window of neighbouring batches.

Dealing a batch to ranks (``balance.py``) cannot even out a batch with one row dearer than all the
others' shares. Sorting can: a window of ``W`` global batches is sorted by cost and cut into batches
again, which are trained in a random order. That changes which rows make a batch, so it is asked for
(``--megasft-cost-window``): a batch of long documents only is not a random sample of the data.
Simulated on the long-context lengths of ``tools/bench_packing.py`` (8 ranks x 4 rows): a step takes
1.08 times the ideal dealt, 1.02 with a window of 4 batches.

Row ``k`` of the run stays a pure function of plan, seed, window and ``k``; windows end at the edges
of epochs and stages, so each still trains its own rows once. The price: a window knows the size of
a batch, so a run does not resume with another one (``training/resume.py`` refuses it).
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.packing.order import RowOrder

_SHUFFLE: Final = 0xBA7C4
"""Sets the seeds of windows apart from those of epochs."""


class CostWindow(NamedTuple):
    """How far rows may move, counted in global batches.

    Attributes:
        num_batches: Global batches of a window.
        batch_rows: Rows of a global batch.
    """

    num_batches: int
    batch_rows: int

    @property
    def identity(self) -> str:
        """Say in words what a run's position depends on."""
        return f"cost window {self.num_batches} batches of {self.batch_rows} rows"


class WindowedOrder:
    """The order of a run with windows sorted by cost; remembers two windows.

    Args:
        order: The rows of the run.
        costs: [R]. Anything that grows with the cost of each row of the plan.
        window: How far rows may move.

    Example:
        >>> order = RowOrder(num_rows=8, seed=1)
        >>> windowed = WindowedOrder(order, np.arange(8), CostWindow(num_batches=4, batch_rows=2))
        >>> sorted(sorted((windowed[k], windowed[k + 1])) for k in range(0, 8, 2))
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    """

    def __init__(
        self, order: RowOrder, costs: npt.NDArray[np.number[Any]], window: CostWindow
    ) -> None:
        self.order, self.costs, self.window = order, costs, window
        self._windows: dict[int, npt.NDArray[np.int64]] = {}

    def __getitem__(self, position: int) -> int:
        first, end = self._borders(position)
        if first not in self._windows:
            newest = max(self._windows, default=first)
            self._windows = {f: rows for f, rows in self._windows.items() if f == newest}
            self._windows[first] = self._sorted(first, end)
        return int(self._windows[first][position - first])

    def _borders(self, position: int) -> tuple[int, int]:
        """Return where the window of a position starts and ends, within its epoch and stage."""
        size = self.window.num_batches * self.window.batch_rows
        num_rows, stages = self.order.num_rows, self.order.stages
        epoch_start = position // num_rows * num_rows
        stage = int(np.searchsorted(stages, position - epoch_start, side="right"))
        window_start = position // size * size
        return (
            max(window_start, epoch_start + stages[stage - 1]),
            min(window_start + size, epoch_start + stages[stage]),
        )

    def _sorted(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return the rows of positions [first, end): sorted, cut into batches, those shuffled."""
        rows = np.array([self.order[k] for k in range(first, end)])
        rows = rows[np.argsort(self.costs[rows], kind="stable")]
        batch_rows = self.window.batch_rows
        # Batches start at multiples of their size, wherever the window does.
        # [6, 14) in batches of 4 -> borders [6, 8, 12, 14]
        inner = range(first // batch_rows * batch_rows + batch_rows, end, batch_rows)
        sizes = np.diff([first, *inner, end])
        rng = np.random.default_rng([self.order.seed, _SHUFFLE, first])
        cheapest_first = rng.permutation(len(sizes))
        pieces = np.split(rows, np.cumsum(sizes[cheapest_first])[:-1])
        return np.concatenate([pieces[place] for place in np.argsort(cheapest_first)])
