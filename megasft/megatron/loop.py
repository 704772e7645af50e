"""What Megatron's loop knows while it runs: sizes and places of ranks, its writers, its FLOPs.

Megatron is imported where a function is called: those who ask are imported before the stand-ins of
``cpu.py`` are in place.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megasft.packing.balance import BatchShape


def context_parallel() -> tuple[int, int]:
    """Return this rank's place among the ranks that share its rows, and how many these are."""
    from megatron.core import mpu

    return mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()


def batch_shape(args: Any) -> BatchShape:
    """Return how the current global batch is distributed to data-parallel ranks.

    Args:
        args: Megatron's flags.
    """
    from megatron.core import mpu

    return BatchShape(batch_size(), mpu.get_data_parallel_world_size(), args.micro_batch_size)


def batch_size() -> int:
    """Return the rows of the current global batch; a run may change its batch size."""
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

    return int(get_current_running_global_batch_size())


def validation_split() -> object:
    """Return what marks a dataset as that of evaluations, for Megatron's loader."""
    from megatron.core.datasets.utils import Split

    return Split.valid


def writers() -> tuple[Any, Any]:
    """Return Megatron's writers to TensorBoard and W&B; None where this rank has none."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    return get_tensorboard_writer(), get_wandb_writer()


def operations(args: Any, lengths: npt.NDArray[np.int64]) -> float:
    """Return the operations of a training step, by Megatron's count.

    Args:
        args: Megatron's flags.
        lengths: int64 [D]. True length of each document of the global batch.
    """
    from megatron.training.training import num_floating_point_operations

    return float(
        num_floating_point_operations(
            args,
            batch_size=0,
            seqlen_squared_sum_in_batch=float(np.square(lengths).sum()),
            total_real_tokens_in_batch=float(lengths.sum()),
        )
    )
