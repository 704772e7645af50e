"""Dynamic fine-tuning (DFT): labels the model finds improbable count less.

Source: "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification" (arXiv 2508.05629): weight each label by its own probability, detached; ``alpha``
blends with plain cross entropy. The probability is ``exp(-ce)`` of the loss Megatron has computed
already, over the whole vocabulary even when it is split: no second softmax.
"""

import torch


def dft_weights(losses: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """Return ``alpha * p + 1 - alpha`` with ``p = exp(-loss)``, detached.

    Args:
        losses: float32 [T]. Cross entropy per label.
        alpha: 0 is plain cross entropy, 1 is the paper's DFT.

    Returns:
        float32 [T], in ``[1 - alpha, 1]``.

    Example:
        >>> dft_weights(torch.tensor([0.0, 100.0]), alpha=0.75).tolist()
        [1.0, 0.25]
    """
    return alpha * torch.exp(-losses.detach()) + (1.0 - alpha)
