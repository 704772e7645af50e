"""The contract of every backend on one rank: the definition, isolation, types."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megasft.attention.backend import BACKENDS
from megasft.attention.blocks import RowLayout
from megasft.attention.reference import reference_attention
from megasft.attention.sdpa import sdpa_attention
from megasft.cp_layout import attention_spans, zigzag_positions

BORDERS = (0, 8, 16, 40, 48)
TOKENS, HEADS, GROUPS, KEY_SIZE, VALUE_SIZE = 48, 4, 2, 8, 6
ROW = RowLayout(borders=BORDERS, cp_rank=0, cp_size=1, device=torch.device("cpu"))


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, KEY_SIZE), (GROUPS, KEY_SIZE), (GROUPS, VALUE_SIZE))
    return [torch.randn(TOKENS, *s, generator=generator, dtype=torch.float64).to(dtype)
            for s in shapes]  # fmt: skip


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """Softmax of each query over the keys it may see, one query at a time."""
    rows = []
    for t in range(TOKENS):
        start = max(b for b in BORDERS if b <= t)
        first = start if window is None else max(start, t - window)
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            probs = torch.softmax(k[first : t + 1, g] @ q[t, h] * scale, dim=0)
            heads.append(probs @ v[first : t + 1, g])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def output_weight() -> torch.Tensor:
    count = TOKENS * HEADS * VALUE_SIZE
    weight = torch.linspace(-1, 1, count, dtype=torch.float64)
    return weight.reshape(TOKENS, HEADS, VALUE_SIZE)


def expected_results(window: int | None) -> list[torch.Tensor]:
    """Return float64 output, dq, dk, dv."""
    leaves = [x.requires_grad_() for x in tensors(torch.float64)]
    out = by_definition(*leaves, scale=0.3, window=window)
    grads = torch.autograd.grad((out * output_weight()).sum(), leaves)
    # A query that sees its own key alone has nothing to weigh: only the values have a gradient.
    assert min(float(g.abs().max()) for g in grads[2 if window == 0 else 0 :]) > 0.1
    return [out.detach(), *grads]


@pytest.mark.parametrize("window", [None, 5, 1, 0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16 keeps 8 bits: 2^-8 of the largest values, which are near 4.
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_output_and_gradients_equal_the_definition(
    backend: str, dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    expected = expected_results(window)
    leaves = [x.requires_grad_() for x in tensors(dtype)]

    out = BACKENDS[backend](*leaves, row=ROW, scale=0.3, window=window, group=None)
    grads = torch.autograd.grad((out.double() * output_weight()).sum(), leaves)

    for result, wanted in zip((out, *grads), expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_document_does_not_see_its_neighbours_nor_the_future(backend: str) -> None:
    query, key, value = tensors(torch.float32)
    before = BACKENDS[backend](query, key, value, row=ROW, scale=1.0, window=None, group=None)
    key[20], value[20] = 100.0, -100.0  # inside the third document, 16..40

    after = BACKENDS[backend](query, key, value, row=ROW, scale=1.0, window=None, group=None)

    changed = (before != after).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= set(range(20, 40)) and 20 in changed


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_window_hides_older_keys(backend: str) -> None:
    query, key, value = tensors(torch.float32)
    before = BACKENDS[backend](query, key, value, row=ROW, scale=1.0, window=3, group=None)
    value[20] += 1.0

    after = BACKENDS[backend](query, key, value, row=ROW, scale=1.0, window=3, group=None)

    changed = (before != after).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert changed == [20, 21, 22, 23]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("attend", [sdpa_attention, reference_attention])
def test_spans_of_every_share_equal_the_definition(
    attend: object, cp_size: int, window: int | None
) -> None:
    assert callable(attend)
    expected, *expected_grads = expected_results(window)
    leaves = [x.requires_grad_() for x in tensors(torch.float32)]
    query, key, value = leaves
    cu = np.array(BORDERS)
    for rank in range(cp_size):
        mine = torch.from_numpy(zigzag_positions(cu, cp_rank=rank, cp_size=cp_size))
        spans = attention_spans(cu, cp_rank=rank, cp_size=cp_size)
        context = attend(query[mine], key, value, spans=spans, scale=0.3, window=window)
        torch.testing.assert_close(context.double(), expected[mine], rtol=1e-5, atol=1e-5)
        (context * output_weight()[mine].float()).sum().backward()

    for leaf, wanted in zip(leaves, expected_grads, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_what_is_kept_for_backward_is_linear_in_the_row(backend: str) -> None:
    def kept_bytes(name: str, tokens: int, window: int | None = None) -> int:
        row = RowLayout(borders=(0, tokens), cp_rank=0, cp_size=1, device=torch.device("cpu"))
        shapes = ((tokens, HEADS, 8), (tokens, GROUPS, 8), (tokens, GROUPS, 8))
        leaves = [torch.ones(shape, requires_grad=True) for shape in shapes]
        sizes: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = BACKENDS[name](*leaves, row=row, scale=1.0, window=window, group=None)
        assert out.requires_grad
        return sum(sizes.values())

    sizes = [kept_bytes(backend, tokens) for tokens in (256, 512, 1024)]
    assert [b / a for a, b in pairwise(sizes)] == [2.0, 2.0]
    windowed = [kept_bytes(backend, tokens, window=tokens // 4) for tokens in (512, 1024)]
    assert windowed[1] <= 2 * windowed[0]
    quadratic = [kept_bytes("reference", tokens) for tokens in (256, 512)]
    assert quadratic[1] / quadratic[0] > 3, "the measure must see the reference's square"
