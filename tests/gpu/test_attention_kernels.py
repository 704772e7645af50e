"""The CUDA block kernels against the float64 definition. Needs a GPU; nothing else runs them."""

import pytest
import torch

from megasft.attention.blocks import RowLayout
from megasft.attention.blockwise import Plan, SharesAtHand
from megasft.attention.kernels.choice import KERNELS, choose
from megasft.attention.kernels.kernel import QKV
from megasft.compat import has
from megasft.cp_layout import zigzag_positions
from tests.attention_cases import SCALE, Case, answer, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
RESULTS = ("out", "dq", "dk", "dv")
# 8 bits of mantissa in bf16: outputs near 1 are right to 2^-8, gradients sum several such terms.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def on_all_ranks(
    case: Case, kernel: str, dtype: torch.dtype, *, cp_size: int
) -> list[torch.Tensor]:
    """Return output, dq, dk, dv of the whole row, computed share by share in this process."""
    *inputs, weight = (x.to(CUDA) for x in tensors(case, dtype))
    leaves = [x.requires_grad_() for x in inputs]
    query, key, value = leaves
    borders = torch.tensor(case.borders).numpy()
    owned = [
        torch.from_numpy(zigzag_positions(borders, cp_rank=r, cp_size=cp_size)).to(CUDA)
        for r in range(cp_size)
    ]
    out = torch.zeros_like(weight)
    for rank, mine in enumerate(owned):
        row = RowLayout(borders=case.borders, cp_rank=rank, cp_size=cp_size, device=CUDA)
        steps = row.steps(row.window_that_matters(case.window))
        refusal = KERNELS[kernel].refusal(QKV(query, key, value), steps[0].block)
        assert refusal is None, refusal
        keys, values = (torch.stack([x[p] for p in owned]) for x in (key, value))
        shares = SharesAtHand.apply(query[mine], keys, values, Plan(steps, SCALE, kernel))
        out = out.index_add(0, mine, shares)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def compare(case: Case, kernel: str, dtype: torch.dtype, *, cp_size: int) -> None:
    found = on_all_ranks(case, kernel, dtype, cp_size=cp_size)
    for what, result, wanted in zip(RESULTS, found, answer(case, rounded=dtype), strict=True):
        assert result.dtype == dtype
        # Relative to the largest value: single elements cancel to anything near 0.
        error = (result.double().cpu() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], f"{what}: {float(error):.2e}"


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(64, 64), (192, 128), (20, 20)])
@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["flash_attn", "torch_cuda"])
def test_flash_kernels_equal_the_definition(
    kernel: str, dtype: torch.dtype, ratio: int, sizes: tuple[int, int], cp_size: int
) -> None:
    """Packed documents, grouped heads, heads that need padding, merged over one to four shares."""
    if kernel == "flash_attn" and not has("flash_attn"):
        pytest.skip("flash_attn is not installed")
    case = Case((0, 8, 64, 320, 1024), groups=2, ratio=ratio, sizes=sizes, window=None, seed=0)
    compare(case, kernel, dtype, cp_size=cp_size)


@pytest.mark.parametrize("kernel", ["flash_attn", "torch_cuda"])
def test_flash_kernels_count_a_window_as_the_definition_does(kernel: str) -> None:
    if kernel == "flash_attn" and not has("flash_attn"):
        pytest.skip("flash_attn is not installed")
    for window in (1, 7, 128):
        case = Case((0, 8, 512), groups=2, ratio=4, sizes=(64, 64), window=window, seed=0)
        compare(case, kernel, torch.bfloat16, cp_size=1)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_tiles_compute_what_the_flash_kernels_refuse(cp_size: int) -> None:
    case = Case((0, 8, 512), groups=2, ratio=4, sizes=(64, 64), window=100, seed=0)
    compare(case, "tiled", torch.float32, cp_size=cp_size)
    compare(case, "tiled", torch.bfloat16, cp_size=cp_size)


def test_the_choice_on_a_gpu() -> None:
    best = "flash_attn" if has("flash_attn") else "torch_cuda"
    whole = RowLayout(borders=(0, 64), cp_rank=0, cp_size=1, device=CUDA)
    share = RowLayout(borders=(0, 64), cp_rank=0, cp_size=2, device=CUDA)

    def chosen(dtype: torch.dtype, row: RowLayout, window: int | None) -> str:
        case = Case(row.borders, groups=1, ratio=1, sizes=(64, 64), window=window, seed=0)
        qkv = QKV(*(x.to(CUDA) for x in tensors(case, dtype)[:3]))
        return choose(qkv, row.steps(window)[0].block)

    assert chosen(torch.bfloat16, whole, None) == best
    assert chosen(torch.bfloat16, whole, 7) == best
    assert chosen(torch.bfloat16, share, None) == best
    assert chosen(torch.bfloat16, share, 7) == "tiled"
    assert chosen(torch.float32, whole, None) == "tiled"
