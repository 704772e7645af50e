"""Known defects of packed training, to inject: a proof that cannot fail proves nothing.

Each is a mistake a framework has shipped. They act on one rank's share or loss, where a wrong
program would act.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from megasft.loss.loss_func import LossOutput
from megasft.ranks.layout import Layout
from megasft.schema import SFTBatch


def _same_share(batch: SFTBatch) -> SFTBatch:
    return batch


def _same_loss(output: LossOutput, _: SFTBatch) -> LossOutput:
    return output


@dataclass(frozen=True, slots=True)
class Defect:
    """One way to be wrong.

    Attributes:
        what: What goes wrong, in a sentence.
        share: Changes one rank's share of a micro-batch.
        loss: Changes what the loss function returns for it.
        needs_cp: Whether it shows only where a row is cut over ranks.
    """

    what: str
    share: Callable[[SFTBatch], SFTBatch] = _same_share
    loss: Callable[[LossOutput, SFTBatch], LossOutput] = _same_loss
    needs_cp: bool = False

    def shows_on(self, layout: Layout) -> bool:
        """Say whether a layout can show it."""
        return layout.cp > 1 or not self.needs_cp


def _lose_seam_labels(batch: SFTBatch) -> SFTBatch:
    """Drop the label at the end of each slice, as shifting after the cut does."""
    followed = batch.position_ids[1:] == batch.position_ids[:-1] + 1
    is_seam = ~torch.cat([followed, followed.new_zeros(1)])
    return batch._replace(turn_tokens=torch.where(is_seam, 0, batch.turn_tokens))


def _count_on_every_share(output: LossOutput, batch: SFTBatch) -> LossOutput:
    """Count a turn wherever one of its labels is, instead of where its last one is."""
    labelled = batch.turn_tokens > 0
    starts = labelled & ~torch.cat([labelled.new_zeros(1), labelled[:-1] & ~batch.ends_turn[:-1]])
    return output._replace(units=starts.sum(dtype=torch.int32))


def _mean_of_rows(output: LossOutput, _: SFTBatch) -> LossOutput:
    """Average over the turns of each micro-batch, and then over micro-batches."""
    mean = output.loss_sum / output.units.clamp(min=1)
    return output._replace(loss_sum=mean, units=torch.ones_like(output.units))


def _divide_by_tokens(output: LossOutput, batch: SFTBatch) -> LossOutput:
    """Return the number of label tokens where the number of units belongs."""
    return output._replace(units=(batch.turn_tokens > 0).sum(dtype=torch.int32))


DEFECTS: Final[dict[str | None, Defect]] = {
    "cp-seam": Defect(
        "labels are shifted after the cut, so that one is lost at each seam",
        share=_lose_seam_labels,
        needs_cp=True,
    ),
    "double-count": Defect(
        "a turn counts on every rank that has a part of it",
        loss=_count_on_every_share,
        needs_cp=True,
    ),
    "per-row-mean": Defect(
        "turns are averaged per micro-batch, and then over micro-batches", loss=_mean_of_rows
    ),
    "token-divisor": Defect(
        "the sum over turns is divided by the number of tokens", loss=_divide_by_tokens
    ),
}
"""``megasft prove --break NAME``."""
