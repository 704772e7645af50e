"""How attention over one set of keys and attention over another become attention over both.

Softmax needs the largest score and the sum of exponentials over *all* keys. Each part keeps the
logarithm of that sum, its log-sum-exp ``L``; two parts with outputs ``o1``, ``o2`` merge as

    L = log(exp(L1) + exp(L2))        o = o1 exp(L1 - L) + o2 exp(L2 - L)

and because the two weights sum to one, the second is ``sigmoid(L2 - L1)`` and ``o`` an
interpolation: no exponential can overflow and no largest score has to be kept.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018,
arXiv:1805.02867; for attention outputs Dao et al., "FlashAttention", 2022, arXiv:2205.14135.
"""

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type sums are kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    rows: torch.Tensor | slice | None = None,
) -> None:
    """Merge attention over more keys into ``out`` and ``lse``, in place.

    Args:
        out: float32 or float64 [T, H, F]. Attention over the keys seen so far.
        lse: dtype of ``out`` [T, H]. Its log-sum-exp; -inf where no key was seen yet.
        part_out: float [t, H, F]. Attention over other keys; finite also where none is visible.
        part_lse: float [t, H]. -inf where none is visible.
        rows: The ``t`` queries of the part, as an int64 index or a slice; None for all.

    Example:
        >>> out, lse = torch.zeros(1, 1, 1), torch.zeros(1, 1)           # one key of score 0
        >>> merge(out, lse, torch.ones(1, 1, 1), torch.zeros(1, 1))      # and one more
        >>> out.item(), round(lse.item(), 3)
        (0.5, 0.693)
    """
    seen_out, seen_lse = (out, lse) if rows is None else (out[rows], lse[rows])
    part_lse = part_lse.to(lse.dtype)
    # Neither side saw a key: -inf - -inf is nan, and the weight must be 0.
    weight = torch.sigmoid(part_lse - seen_lse).masked_fill(part_lse == float("-inf"), 0.0)
    merged_out = torch.lerp(seen_out, part_out.to(out.dtype), weight.unsqueeze(-1))
    merged_lse = torch.logaddexp(seen_lse, part_lse)
    if rows is None:
        out.copy_(merged_out)
        lse.copy_(merged_lse)
    else:
        out[rows] = merged_out
        lse[rows] = merged_lse
