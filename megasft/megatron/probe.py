"""A place to look into a training run, and to break it on purpose; `megasft prove` uses it.

A run without a probe pays nothing. What a probe may change is what a defect would change: the share
of a batch, and the loss output of a micro-batch. It sees the gradients of a step when Megatron has
finished with them (reduced over all ranks and divided) and before the optimizer has begun.
"""

from typing import Any, Protocol

from megasft.loss.loss_func import LossOutput
from megasft.schema import SFTBatch


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
