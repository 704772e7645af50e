"""Hands a run to Megatron's ``pretrain()``."""

from collections.abc import Callable
from typing import Any


def loop_config(args: Any, model: Any) -> Any:
    """Return Megatron's configuration of everything but the model, with the model's in it.

    Args:
        args: Validated flags, published already (``megatron/flags.py``).
        model: As ``model_config`` returns it.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    return pretrain_cfg_container_from_args(args, model)


def pretrain(
    config: Any,
    *,
    datasets: Callable[[Any], Any],
    forward_step: Callable[..., Any],
    evaluated: Callable[..., None],
) -> None:
    """Train.

    Args:
        config: Of the run, see ``loop_config``.
        datasets: Returns the train, validation and test dataset of this rank.
        forward_step: Runs the model on a micro-batch, and returns its losses and what sums them.
        evaluated: Called after each evaluation.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    pretrain(
        config,
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        non_loss_data_func=evaluated,
    )
