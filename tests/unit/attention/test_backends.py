"""Backends against a per-query float64 definition, forward and gradients."""

import numpy as np
import pytest
import torch

from megasft.attention.all_gather import row_order
from megasft.attention.backend import BACKENDS
from megasft.cp_layout import attention_spans, zigzag_positions

BORDERS = (0, 8, 16, 40, 48)
TOKENS, HEADS, GROUPS, KEY_SIZE, VALUE_SIZE = 48, 4, 2, 8, 6


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, KEY_SIZE), (GROUPS, KEY_SIZE), (GROUPS, VALUE_SIZE))
    return [torch.randn(TOKENS, *s, generator=generator, dtype=torch.float64).to(dtype)
            for s in shapes]  # fmt: skip


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of each query over the keys of its document up to itself, one query at a time."""
    rows = []
    for t in range(TOKENS):
        start = max(b for b in BORDERS if b <= t)
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            probs = torch.softmax(k[start : t + 1, g] @ q[t, h] * scale, dim=0)
            heads.append(probs @ v[start : t + 1, g])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_output_and_gradients_equal_the_definition_on_every_share(
    backend: str, cp_size: int
) -> None:
    oracle = [x.requires_grad_() for x in tensors(torch.float64)]
    weight = torch.linspace(-1, 1, TOKENS * HEADS * VALUE_SIZE, dtype=torch.float64)
    weight = weight.reshape(TOKENS, HEADS, VALUE_SIZE)
    expected = by_definition(*oracle, scale=0.3)
    (expected * weight).sum().backward()

    ours = [x.requires_grad_() for x in tensors(torch.float32)]
    query, key, value = ours
    for rank in range(cp_size):
        cu = np.array(BORDERS)
        mine = torch.from_numpy(zigzag_positions(cu, cp_rank=rank, cp_size=cp_size))
        spans = attention_spans(cu, cp_rank=rank, cp_size=cp_size)
        context = BACKENDS[backend](query[mine], key, value, spans=spans, scale=0.3)
        assert context.dtype == torch.float32
        torch.testing.assert_close(context.double(), expected[mine], rtol=1e-5, atol=1e-5)
        (context * weight[mine].float()).sum().backward()

    for mine, theirs in zip(ours, oracle, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert theirs.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_document_does_not_see_its_neighbours_nor_the_future(backend: str) -> None:
    query, key, value = tensors(torch.float32)
    spans = attention_spans(np.array(BORDERS), cp_rank=0, cp_size=1)
    before = BACKENDS[backend](query, key, value, spans=spans, scale=1.0)
    key[20], value[20] = 100.0, -100.0  # inside the third document, 16..40

    after = BACKENDS[backend](query, key, value, spans=spans, scale=1.0)

    changed = (before != after).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= set(range(20, 40)) and 20 in changed


@pytest.mark.parametrize("cp_size", [2, 4])
def test_gathered_shares_come_back_in_row_order(cp_size: int) -> None:
    cu = np.array(BORDERS)
    shares = [zigzag_positions(cu, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    gathered = torch.from_numpy(np.concatenate(shares))

    assert gathered[row_order(BORDERS, cp_size=cp_size)].tolist() == list(range(TOKENS))
