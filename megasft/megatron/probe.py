"""What follows a run from inside: the observer that reports it, and a probe that may break it.

`megasft prove` uses a probe to look into a training run, and to break it on purpose. A run without
one pays nothing. What a probe may change is what a defect would change: the share of a batch, and
the loss output of a micro-batch. It sees the gradients of a step when Megatron has finished with
them (reduced over all ranks and divided) and before the optimizer has begun.
"""

from typing import Any, Protocol

import torch

from megasft.loss.loss_func import LossOutput
from megasft.schema import SFTBatch


class Observer(Protocol):
    """What is notified of each micro-batch and step of a run."""

    def begin_step(self) -> None:
        """Note that a training micro-batch begins, the first of its step or another."""
        ...

    def add(self, losses: torch.Tensor, batch: SFTBatch, *, is_training: bool) -> None:
        """See the losses of a micro-batch: on the last stage, one rank of a tensor group."""
        ...

    def finalize(self, config: Any, num_units: torch.Tensor) -> None:
        """See, on every rank, that the gradients of a step are final, and what divided them."""
        ...


class Probe(Protocol):
    """What looks into a run."""

    def share(self, batch: SFTBatch) -> SFTBatch:
        """See, and maybe replace, one rank's share of a training micro-batch."""
        ...

    def loss(self, output: LossOutput, batch: SFTBatch) -> LossOutput:
        """See, and maybe replace, what the loss function returns for it."""
        ...

    def gradients(self, model: list[Any], units: int) -> None:
        """See the model's chunks of this rank with their final gradients, and the divisor."""
        ...
