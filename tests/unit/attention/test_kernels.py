"""Every block kernel that runs here, alone and merged over the blocks of all ranks."""

from itertools import pairwise

import pytest
import torch

from megasft.attention.blocks import RowLayout
from megasft.attention.blockwise import Plan, SharesAtHand
from megasft.attention.kernels import tiled
from megasft.attention.kernels.choice import KERNELS, choose
from megasft.attention.kernels.kernel import QKV
from megasft.attention.online_softmax import merge
from megasft.cp_layout import zigzag_positions
from tests.attention_cases import GQA_RATIOS, SCALE, Case, answer, random_case, tensors

CPU = torch.device("cpu")


def on_all_ranks(case: Case, kernel: str, cp_size: int) -> list[torch.Tensor]:
    """Return output, dq, dk, dv of the whole row, computed share by share in this process."""
    query, key, value, weight = tensors(case, torch.float32)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    cu = torch.tensor(case.borders).numpy()
    owned = [
        torch.from_numpy(zigzag_positions(cu, cp_rank=r, cp_size=cp_size)) for r in range(cp_size)
    ]
    out = torch.zeros_like(weight)
    for rank, mine in enumerate(owned):
        row = RowLayout(borders=case.borders, cp_rank=rank, cp_size=cp_size, device=CPU)
        steps = row.steps(row.window_that_matters(case.window))
        keys, values = (torch.stack([x[p] for p in owned]) for x in (key, value))
        shares = SharesAtHand.apply(query[mine], keys, values, Plan(steps, SCALE, kernel))
        out = out.index_add(0, mine, shares)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_random_rows_equal_the_definition(cp_size: int) -> None:
    """Several processes: tests/invariance/test_ring.py."""
    ratios, kernels = set(), set()
    for number in range(100 if cp_size == 1 else 30):
        case = random_case(number, cp_size=cp_size)
        row = RowLayout(borders=case.borders, cp_rank=0, cp_size=cp_size, device=CPU)
        block = row.steps(row.window_that_matters(case.window))[0].block
        kernel = choose(QKV(*tensors(case, torch.float32)[:3]), block)
        found = on_all_ranks(case, kernel, cp_size)
        for result, wanted in zip(found, answer(case), strict=True):
            torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
        ratios.add(case.ratio)
        kernels.add(kernel)
    assert ratios == set(GQA_RATIOS) and kernels == {"torch_cpu", "tiled"}


@pytest.mark.parametrize("cp_size", [1, 2])
def test_tiles_smaller_than_a_document_change_nothing(
    monkeypatch: pytest.MonkeyPatch, cp_size: int
) -> None:
    monkeypatch.setattr(tiled, "TILE", 8)
    for window in (None, 0, 3, 11, 30):
        case = Case((0, 4, 56, 80), groups=2, ratio=4, sizes=(24, 16), window=window, seed=1)
        for result, wanted in zip(on_all_ranks(case, "tiled", cp_size), answer(case), strict=True):
            torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_tiles_outside_the_window_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 8)
    row = RowLayout(borders=(0, 64), cp_rank=0, cp_size=1, device=CPU)
    count = {w: len(list(tiled._tiles(row.steps(w)[0].block))) for w in (None, 9)}
    # own tile, the one before, and the last key of a third
    assert count == {None: 8 * 9 // 2, 9: 8 + 7 + 6}


@pytest.mark.parametrize("kernel", ["torch_cpu", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_log_sum_exp_is_that_of_the_scores(kernel: str, dtype: torch.dtype) -> None:
    case = Case((0, 5, 12), groups=1, ratio=2, sizes=(8, 8), window=None, seed=3)
    qkv = QKV(*tensors(case, dtype)[:3])
    row = RowLayout(borders=case.borders, cp_rank=0, cp_size=1, device=CPU)
    (step,) = row.steps(None)

    out, lse = KERNELS[kernel].forward(qkv, step.block, scale=SCALE)

    assert out.shape == (12, 2, 8) and lse.shape == (12, 2)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = qkv.query[11, 1].double() @ qkv.key[5:12, 0].double().T * SCALE
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-6, "atol": 1e-6}
    )
    torch.testing.assert_close(lse[11, 1].double(), scores.logsumexp(0), **tolerance)
    assert lse[0, 0].item() == pytest.approx(
        float(qkv.query[0, 0].double() @ qkv.key[0, 0].double()) * SCALE, abs=1e-3
    )


def test_every_kernel_says_why_it_refuses() -> None:
    case = Case((0, 8), groups=1, ratio=1, sizes=(8, 8), window=3, seed=0)
    qkv = QKV(*tensors(case, torch.float32)[:3])
    row = RowLayout(borders=case.borders, cp_rank=0, cp_size=1, device=CPU)
    (step,) = row.steps(3)
    refusals = {name: kernel.refusal(qkv, step.block) for name, kernel in KERNELS.items()}
    assert refusals["tiled"] is None and list(KERNELS)[-1] == "tiled"
    assert refusals["torch_cpu"] == "it has no sliding window"
    assert "CUDA" in str(refusals["torch_cuda"])
    assert choose(qkv, step.block) == "tiled"


def test_a_merge_equals_one_softmax_over_both_parts() -> None:
    scores = torch.randn(6, 3, 20, dtype=torch.float64) * 30  # large: no exponential may overflow
    values = torch.randn(20, 5, dtype=torch.float64)
    parts = [(scores[..., a:b], values[a:b]) for a, b in pairwise((0, 3, 10, 20))]
    out, lse = torch.zeros(6, 3, 5, dtype=torch.float64), torch.full((6, 3), -torch.inf).double()
    for s, v in parts:
        merge(out, lse, s.softmax(-1) @ v, s.logsumexp(-1))

    torch.testing.assert_close(out, scores.softmax(-1) @ values)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_merging_where_nothing_is_visible_changes_nothing_and_makes_no_nan() -> None:
    out, lse = torch.ones(2, 1, 1), torch.tensor([[0.5], [-torch.inf]])
    merge(out, lse, torch.zeros(2, 1, 1), torch.full((2, 1), -torch.inf))
    assert out.flatten().tolist() == [1.0, 1.0] and lse.flatten().tolist() == [0.5, -torch.inf]


def test_only_the_named_rows_are_merged() -> None:
    out, lse = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    merge(out, lse, torch.ones(1, 1, 1), torch.zeros(1, 1), rows=torch.tensor([2]))
    assert out.flatten().tolist() == [0.0, 0.0, 0.5]
