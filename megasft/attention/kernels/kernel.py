"""What a block kernel is: three functions on plain tensors, without communication or autograd.

The backward function takes the output and the log-sum-exp over *all* keys of the row, not the
block's own. With them the probabilities of any block can be recomputed exactly, one block after
another, and the gradients of the blocks simply add up (Dao et al. 2022, arXiv:2205.14135, section
3.1; Liu et al. 2023, arXiv:2310.01889, for blocks that live on other devices).
"""

from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import pad

from megasft.attention.blocks import Block


class QKV(NamedTuple):
    """Queries, keys and values of a block.

    Attributes:
        query: float [T, H, E].
        key: float [K, G, E]. ``H`` is a multiple of ``G``.
        value: float [K, G, F].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Refusal(Protocol):
    """Says why a kernel cannot compute this."""

    def __call__(self, qkv: QKV, block: Block) -> str | None:
        """Return the reason, or None when it can."""
        ...


class Forward(Protocol):
    """Attends within a block.

    Returns:
        ``(out, lse)``: float [T, H, F], dtype of the query or wider; float32 or float64 [T, H],
        -inf with a zero output where a query sees no key.
    """

    def __call__(
        self, qkv: QKV, block: Block, *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend."""
        ...


class Backward(Protocol):
    """Differentiates a block of an attention over more keys.

    Args:
        grad_out: float [T, H, F]. Gradient of the merged output.
        qkv: What the block saw.
        out: float [T, H, F]. Merged output, dtype of the query.
        lse: float32 or float64 [T, H]. Merged log-sum-exp.
        block: Who sees whom.
        scale: Multiplies the scores.

    Returns:
        The block's part of the gradients, shaped as ``qkv``, dtype of the query or wider.
    """

    def __call__(
        self,
        grad_out: torch.Tensor,
        qkv: QKV,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: Block,
        *,
        scale: float,
    ) -> QKV:
        """Differentiate."""
        ...


class BlockKernel(NamedTuple):
    """One implementation."""

    refusal: Refusal
    forward: Forward
    backward: Backward


def padded_heads(tensors: QKV, *, multiple: int = 1) -> QKV:
    """Append zeros to every head so that all three sizes are one, a multiple of ``multiple``.

    Exact: a zero adds nothing to a score, and gives an output column that is cut off again.
    """
    widest = max(x.shape[-1] for x in tensors)
    size = -(-widest // multiple) * multiple
    return QKV(*(widened(x, size) for x in tensors))


def widened(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return float [..., size] with zeros behind the last column."""
    return x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1]))


def trimmed(grads: QKV, like: QKV) -> QKV:
    """Cut the columns off that ``padded_heads`` appended to ``like``."""
    return QKV(*(g[..., : x.shape[-1]] for g, x in zip(grads, like, strict=True)))
