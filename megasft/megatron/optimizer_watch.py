"""Tells when the optimizer has made its step, with the gradient norm and the learning rate.

Megatron 0.19 computes both behind its last hook, hands them from function to function and prints
them on the last rank. Its config does hold the optimizer's ``scale_loss``, so the optimizer is at
hand, and its ``step`` is wrapped on that one object, as Megatron does for CUDA graphs and torch's
learning-rate schedulers do to count steps. Rejected: to compute the norm a second time (a pass over
all gradients and an all-reduce), to read it from the printed line (four digits, on another rank),
to stand in for Megatron's TensorBoard writer (none without ``--tensorboard-dir``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class OptimizerStep(NamedTuple):
    """What came of a step.

    Attributes:
        is_skipped: The gradient was not finite, and nothing was updated.
        grad_norm: Before clipping; None where Megatron computed none.
        learning_rate: The step was made with. (Megatron logs that of the next step.)
    """

    is_skipped: bool
    grad_norm: float | None
    learning_rate: float | None


def watch(config: Any, tell: Callable[[OptimizerStep], None]) -> bool:
    """Call ``tell`` after each step of the optimizer that trains this model.

    Args:
        config: Megatron's ``TransformerConfig``, once ``train()`` has filled it.
        tell: Called on every rank, once per training step.

    Returns:
        Whether there is an optimizer to watch.
    """
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

    optimizer = getattr(config.grad_scale_func, "__self__", None)
    if optimizer is None:
        return False
    step = optimizer.step

    def watched_step() -> tuple[bool, float | None, int | None]:
        learning_rate = get_canonical_lr_for_logging(optimizer.param_groups)
        succeeded, grad_norm, num_zeros = step()
        norm = None if grad_norm is None else float(grad_norm)
        tell(OptimizerStep(not succeeded, norm, learning_rate))
        return succeeded, grad_norm, num_zeros

    optimizer.step = watched_step
    return True
