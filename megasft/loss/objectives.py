"""What the loss is the mean of: turns, samples or tokens.

With ``ce_t`` the cross entropy of label ``t``, ``n_t`` the labels of its turn, ``m_t`` those of
its sample and ``w_t`` the weight of its turn (1 where the data gives none), over the whole batch:

    turn     Σ_t w_t ce_t / n_t  /  number of turns     a long answer weighs what a short one weighs
    sample   Σ_t w_t ce_t / m_t  /  number of samples
    token    Σ_t w_t ce_t        /  number of labels

Weights change no divisor: a turn of weight 0.5 pulls half as much as one of weight 1, and counts as
one. Units stay counts, which Megatron adds as integers and the audit compares. Whoever wants the
weighted mean (``--megasft-turn-weights normalize``) has the loss multiplied by the units over the
sum of their weights, both of the global batch; the weight of a sample is the mean over its labels:

    turn     turns / Σ_turns w      sample   samples / Σ_t w_t / m_t      token   labels / Σ_t w_t

DFT multiplies ``w_t ce_t`` by its own factor, which does not know of weights.

Numerator and denominator are summed separately and divided once, by Megatron
(``--calculate-per-token-loss``). A unit is counted on the rank that owns its last label, so counts
add up over context-parallel shares. The per-label lengths come with the data: no communication.

Source: the formula of DESIGN.md; a turn mean per packed row, or averaged over ranks, is another
number (a turn in a row of 2 would weigh 9 x one in a row of 18).
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from megasft.schema import SFTBatch


class Objective(NamedTuple):
    """How labels are weighted and what is counted.

    Attributes:
        weights: Batch to float32 [T]: the weight of each label, that of its turn counted; 0 where
            there is none.
        units: Batch to bool [T]: the labels at which a unit is counted.
        unit: Name of a unit, for messages.
    """

    weights: Callable[[SFTBatch], torch.Tensor]
    units: Callable[[SFTBatch], torch.Tensor]
    unit: str


def has_label(batch: SFTBatch) -> torch.Tensor:
    """Return bool [T]: where there is a label to train on."""
    return batch.turn_tokens > 0


def _per(lengths: torch.Tensor, batch: SFTBatch) -> torch.Tensor:
    """Return float32 [T]: weight of the turn / length, and 0 where the length is 0."""
    return torch.where(lengths > 0, batch.turn_weights / lengths.clamp(min=1).float(), 0.0)


OBJECTIVES: Final[dict[str, Objective]] = {
    "turn": Objective(lambda b: _per(b.turn_tokens, b), lambda b: b.ends_turn, "turns"),
    "sample": Objective(lambda b: _per(b.sample_tokens, b), lambda b: b.ends_sample, "samples"),
    "token": Objective(
        lambda b: torch.where(has_label(b), b.turn_weights, 0.0), has_label, "label tokens"
    ),
}
"""``--megasft-loss NAME``."""


def weight_scale(units: int, unit_weights: float) -> float:
    """Return units over the sum of their weights; 1 where there is no unit.

    Example:
        >>> weight_scale(3, 1.5)
        2.0
    """
    return units / unit_weights if units else 1.0
