"""The block kernels by name, best first, and the choice of the first that can."""

from typing import Final

from megasft.attention.blocks import Block
from megasft.attention.kernels import flash_attn_varlen, tiled, torch_cpu, torch_cuda
from megasft.attention.kernels.kernel import QKV, BlockKernel

KERNELS: Final[dict[str, BlockKernel]] = {
    "flash_attn": BlockKernel(
        flash_attn_varlen.refusal, flash_attn_varlen.forward, flash_attn_varlen.backward
    ),
    "torch_cuda": BlockKernel(torch_cuda.refusal, torch_cuda.forward, torch_cuda.backward),
    "torch_cpu": BlockKernel(torch_cpu.refusal, torch_cpu.forward, torch_cpu.backward),
    "tiled": BlockKernel(tiled.refusal, tiled.forward, tiled.backward),
}
"""Best first; the last computes everything."""


def choose(qkv: QKV, block: Block) -> str:
    """Return the name of the first kernel that computes this block.

    The steps of a row differ in borders only, so the choice for one holds for all.
    """
    return next(name for name, kernel in KERNELS.items() if kernel.refusal(qkv, block) is None)
