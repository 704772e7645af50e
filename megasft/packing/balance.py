"""What a row costs to train, and which rank trains it, so that all ranks end a step together.

A step takes as long as its slowest data-parallel rank. Which rank trains a row of the global batch
changes no number, because losses and units are summed over all of it before one division; so the
rows of each global batch are dealt to ranks by cost. No row moves to another global batch: the
position of a run stays one integer, and a run resumes on any layout and batch size.

Rows are first grouped into micro-batches, whatever the number of ranks, and these are dealt to
ranks. So the losses that are means over a micro-batch (a router's) still do not depend on data
parallelism; grouping and dealing at once would be a little more even and give that up. Each rank
trains its dearest micro-batch first, so ranks that meet within a step (expert parallelism) meet at
like micro-batches. Sorting rows over neighbouring batches would do more and change what a batch is;
it has to be asked for (``cost_window.py``).
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.packing.order import RowAtPosition

EVEN: Final = 1.002
"""Heaviest group over the mean at which swapping ends."""


class Cost(NamedTuple):
    """Floating-point operations of training on documents, forward and backward.

    Attributes:
        per_token: What grows with tokens.
        per_square: What grows with the square of a document's tokens.
    """

    per_token: int
    per_square: int

    def of(
        self, tokens: npt.NDArray[np.int64] | int, squares: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return the cost of rows of so many tokens and squared document lengths."""
        return self.per_token * np.asarray(tokens, np.float64) + self.per_square * squares.astype(
            np.float64
        )


class BatchShape(NamedTuple):
    """How a global batch is split; all in rows but ``dp_size``."""

    global_batch_size: int
    dp_size: int
    micro_batch_size: int


def cost_of_model(
    *,
    num_layers: int,
    hidden_size: int,
    attention_size: int,
    key_value_size: int,
    mlp_weights: int,
    vocab_size: int,
) -> Cost:
    """Return the cost of a decoder with causal attention.

    A weight takes 2 operations a token forward and 4 backward (gradients of input and weight). Of a
    layer's attention, each of the two products over pairs of tokens takes ``2 n^2 attention_size``,
    half of it under a causal mask; backward there are five, since scores are computed again.
    Recomputed activations change both sums by about the same factor.

    Args:
        num_layers: Layers.
        hidden_size: Width of the residual stream.
        attention_size: Query heads times their channels.
        key_value_size: Key heads times their channels.
        mlp_weights: Weights of a layer's MLP that one token meets; with experts, of those chosen.
        vocab_size: Rows of the output layer.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), appendix on FLOPs, for the weights; Dao 2023
        (arXiv:2307.08691), section 3.1, for the five products.

    Example:
        >>> cost_of_model(num_layers=2, hidden_size=4, attention_size=4, key_value_size=2,
        ...     mlp_weights=96, vocab_size=10)
        Cost(per_token=1968, per_square=56)
    """
    projections = 2 * hidden_size * (attention_size + key_value_size)
    weights = num_layers * (projections + mlp_weights) + hidden_size * vocab_size
    return Cost(per_token=6 * weights, per_square=7 * num_layers * attention_size)


LLAMA_8B: Final = cost_of_model(
    num_layers=32,
    hidden_size=4096,
    attention_size=4096,
    key_value_size=1024,
    mlp_weights=3 * 4096 * 14_336,
    vocab_size=128_256,
)
"""Where a model's sizes are not known: Llama 3 8B, attention half of all at 49,000 tokens."""


def deal(
    costs: npt.NDArray[np.float64], *, dp_size: int, micro_batch_size: int
) -> npt.NDArray[np.int64]:
    """Return the order in which the rows of a global batch are trained.

    Megatron's sampler gives micro-batch ``m`` of rank ``d`` the ``micro_batch_size`` positions from
    ``(m * dp_size + d) * micro_batch_size`` on.

    Args:
        costs: float64 [B]. Cost of each row of the global batch; B is a multiple of both sizes'
            product.
        dp_size: Data-parallel ranks.
        micro_batch_size: Rows of a micro-batch.

    Returns:
        int64 [B]. Row, as an index into ``costs``, at each position.

    Example:
        >>> deal(np.array([9.0, 8.0, 2.0, 1.0]), dp_size=2, micro_batch_size=1)
        array([0, 1, 3, 2])
    """
    micro_batches = _even_groups(costs, size=micro_batch_size)
    micro_costs = costs[micro_batches].sum(axis=1)
    of_rank = _even_groups(micro_costs, size=len(micro_batches) // dp_size)
    dearest_first = np.argsort(-micro_costs[of_rank], axis=1, kind="stable")
    of_rank = np.take_along_axis(of_rank, dearest_first, axis=1)
    return micro_batches[of_rank].transpose(1, 0, 2).reshape(-1)


def slowest_over_mean(
    costs: npt.NDArray[np.float64], *, dp_size: int, micro_batch_size: int
) -> float:
    """Return the time of a step over that of a step whose ranks end together.

    Args:
        costs: float64 [B]. Cost of the row at each position of a global batch.
        dp_size: Data-parallel ranks.
        micro_batch_size: Rows of a micro-batch.
    """
    of_rank = costs.reshape(-1, dp_size, micro_batch_size).sum(axis=(0, 2))
    return float(of_rank.max() / of_rank.mean())


def _even_groups(costs: npt.NDArray[np.float64], *, size: int) -> npt.NDArray[np.int64]:
    """Split items into groups of one size and like cost.

    Items go out in rounds, the dearest to the cheapest group; then the heaviest group swaps an item
    with another group as long as that makes the heavier of the two lighter.

    Returns:
        int64 [N / size, size]. Items of each group.
    """
    num_groups = len(costs) // size
    if size == 1 or num_groups == 1:
        return np.arange(len(costs)).reshape(num_groups, size)
    rounds = np.argsort(-costs, kind="stable").reshape(size, num_groups)
    groups = np.empty((num_groups, size), np.int64)
    loads = np.zeros(num_groups)
    for i, items in enumerate(rounds):
        cheapest_first = np.argsort(loads, kind="stable")
        groups[cheapest_first, i] = items
        loads[cheapest_first] += costs[items]
    for _ in range(4 * num_groups):
        if loads.max() <= EVEN * loads.mean() or not _swap(groups, loads, costs):
            break
    return groups


def _swap(
    groups: npt.NDArray[np.int64],
    loads: npt.NDArray[np.float64],
    costs: npt.NDArray[np.float64],
) -> bool:
    """Make the best swap of the heaviest group, in place; say whether there was one."""
    heavy = int(loads.argmax())
    # [item of the heaviest, group, item of the group]
    given = costs[groups[heavy]][:, None, None] - costs[groups][None]
    heavier = np.maximum(loads[heavy] - given, loads[None, :, None] + given)
    heavier[:, heavy] = np.inf
    mine, other, theirs = map(int, np.unravel_index(int(heavier.argmin()), heavier.shape))
    if heavier[mine, other, theirs] >= loads[heavy]:
        return False
    a, b = groups[heavy, mine], groups[other, theirs]
    groups[heavy, mine], groups[other, theirs] = b, a
    loads[[heavy, other]] = costs[groups[[heavy, other]]].sum(axis=1)
    return True


class DealtOrder:
    """The order of a run with the rows of each global batch dealt; remembers two global batches.

    Args:
        order: Rows of the run; which of them make a global batch stays as it is.
        row_costs: float64 [R]. Cost of each row of the plan.
        shape: How each global batch is split.
        start: Position at which a global batch starts; those before it are not asked for.

    Example:
        >>> from megasft.packing.order import RowOrder
        >>> order = RowOrder(num_rows=8, seed=1)
        >>> dealt = DealtOrder(order, np.arange(8.0), BatchShape(4, 2, 1))
        >>> sorted(dealt[k] for k in range(4)) == sorted(order[k] for k in range(4))
        True
    """

    def __init__(
        self,
        order: RowAtPosition,
        row_costs: npt.NDArray[np.float64],
        shape: BatchShape,
        *,
        start: int = 0,
    ) -> None:
        self.order, self.row_costs, self.shape, self.start = order, row_costs, shape, start
        self._batches: dict[int, npt.NDArray[np.int64]] = {}

    def __getitem__(self, position: int) -> int:
        assert position >= self.start, (position, self.start)
        size = self.shape.global_batch_size
        number, place = divmod(position - self.start, size)
        if number not in self._batches:
            self._batches = {n: b for n, b in self._batches.items() if n == number - 1}
            first = self.start + number * size
            rows = np.array([self.order[k] for k in range(first, first + size)])
            self._batches[number] = rows[self._deal(rows)]
        return int(self._batches[number][place])

    def _deal(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        _, dp_size, micro_batch_size = self.shape
        return deal(self.row_costs[rows], dp_size=dp_size, micro_batch_size=micro_batch_size)
