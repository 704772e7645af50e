"""The loss by its definition: plain Hugging Face in float64, one unpacked sequence per turn.

Shares nothing with the code under test but the store's reader: no rows, no shifting helper, no
masks. Each supervised turn is run as its own sequence, the conversation up to its last token.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from megasft.schema import Sample


class Oracle(NamedTuple):
    """Loss and gradient norm of a global batch."""

    loss: float
    grad_norm: float
    units: int


def turn_losses(model: PreTrainedModel, sample: Sample) -> list[torch.Tensor]:
    """Cross entropy of each label of each turn; one forward pass per turn."""
    losses = []
    for start, size in sample.turns[:, :2].tolist():
        ids = torch.tensor([sample.tokens[: start + size].tolist()])
        logits = model(input_ids=ids).logits[0].double()
        log_probs = torch.log_softmax(logits[start - 1 : -1], dim=-1)
        losses.append(-log_probs[torch.arange(size), ids[0, start:]])
    return losses


def global_batch(
    model: PreTrainedModel, samples: Iterable[Sample], *, objective: str, dft_alpha: float = 0.0
) -> Oracle:
    """Average over all turns, samples or labels of a global batch; and the gradient's norm.

    DFT multiplies each cross entropy by ``alpha * p + 1 - alpha``, p being a constant for the
    gradient.
    """
    assert next(model.parameters()).dtype == torch.float64
    model.zero_grad()
    total, units = torch.zeros((), dtype=torch.float64), 0
    for sample in (s for s in samples if len(s.turns)):
        losses = [
            ce * (dft_alpha * torch.exp(-ce.detach()) + 1 - dft_alpha)
            for ce in turn_losses(model, sample)
        ]
        if objective == "turn":
            parts, count = [turn.mean() for turn in losses], len(losses)
        elif objective == "sample":
            parts, count = [torch.cat(losses).mean()], 1
        else:
            parts, count = [torch.cat(losses).sum()], sum(len(turn) for turn in losses)
        total, units = total + torch.stack(parts).sum(), units + count
    loss = total / units
    loss.backward()
    squares = [float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None]
    return Oracle(float(loss.detach()), sum(squares) ** 0.5, units)
