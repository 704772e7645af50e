"""The ``flash_attn`` package on packed documents, through its functions without autograd.

The first choice on a GPU where it is installed: its releases are ahead of the copy inside torch.
The functions with a leading underscore are the only ones that take a merged output and log-sum-exp;
ring attention elsewhere is built on the same two, so their arguments are stable since 2.7.
"""

import torch

from megasft.attention.blocks import Block
from megasft.attention.kernels import torch_cuda
from megasft.attention.kernels.kernel import QKV, padded_heads, trimmed, widened
from megasft.compat import has


def refusal(qkv: QKV, block: Block) -> str | None:
    """See ``Refusal``: the same kernel family as torch's, so the same limits."""
    return torch_cuda.refusal(qkv, block) if has("flash_attn") else "flash_attn is not installed"


def forward(qkv: QKV, block: Block, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Forward``."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    query, key, value = (x.contiguous() for x in padded_heads(qkv, multiple=8))
    out, lse_HT, *_ = _flash_attn_varlen_forward(
        query,
        key,
        value,
        block.cu_seqlens_q,
        block.cu_seqlens_k,
        block.longest_q,
        block.longest_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=block.is_causal,
        **torch_cuda.window_sides(block),
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
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    padded = QKV(*(x.contiguous() for x in padded_heads(qkv, multiple=8)))
    size = padded.query.shape[-1]
    grads = QKV(*(torch.empty_like(x) for x in padded))
    _flash_attn_varlen_backward(
        widened(grad_out, size).contiguous(),
        *padded,
        widened(out, size).contiguous(),
        lse.transpose(0, 1).contiguous(),
        *grads,
        block.cu_seqlens_q,
        block.cu_seqlens_k,
        block.longest_q,
        block.longest_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=block.is_causal,
        **torch_cuda.window_sides(block),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return trimmed(grads, qkv)
