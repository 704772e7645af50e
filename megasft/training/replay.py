"""Which row each data-parallel rank trains at each step of a run, without training it.

A run is replayed with what trains: Megatron's sampler for every rank, its calculator of batch
sizes, and the dealt order of ``row_order.py``. Predicting the rows by arithmetic of our own was
rejected: that would show what we believe of Megatron, not what it does. The price: each rank's
sampler counts the positions of all ranks, so a replay takes some 0.1 us per row and rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

from megasft.packing.balance import BatchShape
from megasft.packing.plan import RowPlan
from megasft.training.datasets import ENDLESS
from megasft.training.row_order import training_order


class Step(NamedTuple):
    """The rows of a global batch, of each data-parallel rank in the order it trains them."""

    position: int
    rows_of_rank: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[int]:
        """Return the rows of all ranks."""
        return [row for rows in self.rows_of_rank for row in rows]


@contextmanager
def batch_sizes(args: Any) -> Iterator[None]:
    """Let Megatron calculate the batch sizes of these flags, as a run of them would."""
    from megatron.core import num_microbatches_calculator as calculator

    # As set_global_variables of megatron.training.global_vars, 0.19.2, does.
    calculator.init_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    try:
        yield
    finally:
        calculator.unset_num_microbatches_calculator()


def batch_size_at(position: int, *, is_checked: bool = False) -> int:
    """Return the rows of the global batch that starts at a position, inside ``batch_sizes``.

    Args:
        position: Rows consumed before it.
        is_checked: Whether the ranks must divide it, as Megatron asserts before a step.
    """
    from megatron.core import num_microbatches_calculator as calculator

    calculator.update_num_microbatches(position, consistency_check=is_checked)
    return int(calculator.get_current_running_global_batch_size())


def replay(args: Any, plan: RowPlan, *, start: int, end: int) -> Iterator[Step]:
    """Yield the steps of a run from one position until another is reached or passed.

    Args:
        args: Megatron's flags, validated.
        plan: The rows of the training store.
        start: Where a global batch starts; Megatron's consumed samples when it resumes.
        end: Position.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    args = copy(args)
    args.consumed_train_samples = start
    dp_size, micro_batch_size = args.data_parallel_size, args.micro_batch_size
    with batch_sizes(args):
        shape = BatchShape(batch_size_at(start), dp_size, micro_batch_size)
        order = training_order(args, plan, shape)
        samplers = [
            iter(MegatronPretrainingSampler(ENDLESS, start, micro_batch_size, rank, dp_size))
            for rank in range(dp_size)
        ]
        position = start
        while position < end:
            batch_size_at(position, is_checked=True)
            # All ranks' places first: the order remembers two global batches, ranks are many.
            places = [
                [place for _ in range(get_num_microbatches()) for place in next(sampler)]
                for sampler in samplers
            ]
            step = Step(position, tuple(tuple(order[k] for k in own) for own in places))
            yield step
            position += len(step.rows)


def check_batches(args: Any, *, start: int, end: int) -> None:
    """Let Megatron assert that the ranks divide each global batch from one position to another."""
    with batch_sizes(args):
        while start < end:
            start += batch_size_at(start, is_checked=True)


def step_starts(args: Any, *, start: int, end: int) -> list[int]:
    """Return where the steps began that led to a position, as far back as these flags tell.

    The first of them begins at ``start`` or before, or is preceded by steps of other batch sizes.

    Args:
        args: Megatron's flags, validated.
        start: Position that need not be where a step begins.
        end: Position between two steps.
    """
    starts: list[int] = []
    with batch_sizes(args):
        while end > start and (size := _size_before(end)) is not None:
            end -= size
            starts.append(end)
    return starts[::-1]


def _size_before(end: int) -> int | None:
    """Return the size of the global batch that ended at a position; None if none can have."""
    size = batch_size_at(end - 1)
    while size <= end:
        of_start = batch_size_at(end - size)
        if of_start == size:
            return size
        if of_start > size:
            break
        size = of_start  # batches only grow, so it was one of those before
    return None


def position_after(args: Any, *, start: int, num_steps: int) -> int:
    """Return the position of a run after so many steps."""
    with batch_sizes(args):
        if not args.step_batch_size_schedule:
            return start + num_steps * batch_size_at(start)
        for _ in range(num_steps):
            start += batch_size_at(start)
    return start
