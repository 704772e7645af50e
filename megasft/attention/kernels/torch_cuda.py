"""torch's own flash kernel for CUDA on packed documents; it ships with torch, nothing to install.

Called as operators because ``torch.nn.attention.varlen`` differentiates with its own output, and a
block of a longer row needs the merged one. Without dropout the kernel does not read its random
state, so an empty one is handed to backward.
"""

import torch

from megasft.attention.blocks import Block
from megasft.attention.kernels.kernel import QKV, padded_heads, trimmed, widened


def refusal(qkv: QKV, block: Block) -> str | None:
    """See ``Refusal``."""
    query, _, value = qkv
    if query.device.type != "cuda":
        return f"it computes on CUDA and the tensors are on {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bf16 and fp16, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return "its heads have at most 256 columns"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0"
    if block.window is not None and not block.is_whole_row:
        return "it counts a window in indices, and a zigzag share has gaps"
    return None


def forward(qkv: QKV, block: Block, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Forward``."""
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        *(x.contiguous() for x in padded_heads(qkv, multiple=8)),
        block.cu_seqlens_q,
        block.cu_seqlens_k,
        block.longest_q,
        block.longest_k,
        0.0,  # dropout
        block.is_causal,
        False,  # no debug mask
        scale=scale,
        **window_sides(block),
    )
    return out[..., : qkv.value.shape[-1]], lse_HT.transpose(0, 1)


def backward(
    grad_out: torch.Tensor,
    qkv: QKV,
    out: torch.Tensor,
    lse: torch.Tensor,
    block: Block,
    *,
    scale: float,
) -> QKV:
    """See ``Backward``."""
    padded = padded_heads(qkv, multiple=8)
    size = padded.query.shape[-1]
    grads = torch.ops.aten._flash_attention_backward(
        widened(grad_out, size).contiguous(),
        *(x.contiguous() for x in padded),
        widened(out, size).contiguous(),
        lse.transpose(0, 1).contiguous(),
        block.cu_seqlens_q,
        block.cu_seqlens_k,
        block.longest_q,
        block.longest_k,
        0.0,  # dropout
        block.is_causal,
        torch.zeros(2, dtype=torch.uint64, device=grad_out.device),
        torch.empty(0, device=grad_out.device),
        scale=scale,
        **window_sides(block),
    )
    return trimmed(QKV(*grads), qkv)


def window_sides(block: Block) -> dict[str, int]:
    """Return the window as flash kernels take it: keys before and after, -1 for all."""
    if block.window is None:
        return {"window_size_left": -1, "window_size_right": 0 if block.is_causal else -1}
    return {"window_size_left": block.window, "window_size_right": 0}
