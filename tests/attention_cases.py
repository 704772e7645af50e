"""Random packed rows for attention tests, with their answer by the float64 definition."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from megasft.attention.reference import reference_attention
from megasft.cp_layout import attention_spans

GQA_RATIOS = (1, 4, 8)
HEAD_SIZES = ((16, 16), (24, 16), (8, 16))  # multi-latent attention has E > F
SCALE = 0.3


class Case(NamedTuple):
    """A packed row.

    Attributes:
        borders: Document borders, multiples of ``2 * cp_size``; starts at 0.
        groups: G, key/value heads.
        ratio: H / G.
        sizes: E and F.
        window: Keys before its own position a query sees; None for all.
        seed: Of the tensors.
    """

    borders: tuple[int, ...]
    groups: int
    ratio: int
    sizes: tuple[int, int]
    window: int | None
    seed: int


def random_case(number: int, *, cp_size: int) -> Case:
    """Return row ``number``: the edges and the head shapes go round, the rest is random."""
    rng = np.random.default_rng([number, cp_size])
    unit = 2 * cp_size if cp_size > 1 else 1
    lengths = unit * rng.integers(1, max(3, 40 // unit), size=int(rng.integers(2, 7)))
    if number % 10 == 0:
        lengths = lengths.sum(keepdims=True)  # one document fills the row
    else:
        lengths[rng.integers(len(lengths))] = unit  # one token per slice
    window = int(rng.integers(1, lengths.max() + 1)) if number % 4 == 3 else None
    return Case(
        borders=(0, *np.cumsum(lengths).tolist()),
        groups=int(rng.integers(1, 3)),
        ratio=GQA_RATIOS[number % len(GQA_RATIOS)],
        sizes=HEAD_SIZES[number // 3 % len(HEAD_SIZES)],
        window=window,
        seed=number,
    )


def tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v of the whole row, and what to multiply the output with; same in any dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    key_size, value_size = case.sizes
    heads = case.groups * case.ratio
    shapes = ((heads, key_size), (case.groups, key_size), (case.groups, value_size))
    return [
        torch.randn(case.borders[-1], *shape, generator=generator).to(dtype)
        for shape in (*shapes, (heads, value_size))
    ]


def answer(case: Case, *, rounded: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return float64 output, dq, dk, dv of the whole row, by the definition, of rounded inputs."""
    query, key, value, weight = (x.double() for x in tensors(case, rounded))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    spans = attention_spans(np.array(case.borders), cp_rank=0, cp_size=1)
    out = reference_attention(*inputs, spans=spans, scale=SCALE, window=case.window)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def longest(case: Case) -> int:
    return max(b - a for a, b in pairwise(case.borders))
