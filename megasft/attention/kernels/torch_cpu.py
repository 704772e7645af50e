"""torch's flash kernel for CPUs, which also returns the log-sum-exp. Pieces of one size in a call.

``scaled_dot_product_attention`` ends in the same kernel but keeps the log-sum-exp to itself. Rows
of short documents are the common case, and documents are padded to a multiple, so few sizes occur:
batching by size needs few calls. It costs one gathered copy of the batched pieces. The kernel keeps
a tile of scores per thread, knows grouped heads, and wants heads of one size: values get zero
columns.
"""

import torch

from megasft.attention.blocks import Block
from megasft.attention.kernels.kernel import QKV, padded_heads, trimmed, widened
from megasft.attention.online_softmax import accumulator_dtype


def refusal(qkv: QKV, block: Block) -> str | None:
    """See ``Refusal``."""
    if qkv.query.device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {qkv.query.device.type}"
    if block.window is not None:
        return "it has no sliding window"
    return None


def forward(qkv: QKV, block: Block, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Forward``."""
    query, key, value = padded_heads(qkv)
    out = torch.zeros_like(query)
    lse_dtype = accumulator_dtype(query.dtype)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=lse_dtype, device=query.device)
    for rows_q, rows_k in block.batches:
        batch_out, batch_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x, i) for x, i in ((query, rows_q), (key, rows_k), (value, rows_k))),
            dropout_p=0.0,
            is_causal=block.is_causal,
            scale=scale,
        )
        # [pieces, heads, tokens, ...] -> [pieces, tokens, heads, ...]
        out[rows_q], lse[rows_q] = batch_out.transpose(1, 2), batch_lse.transpose(1, 2)
    return out[..., : qkv.value.shape[-1]], lse


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
    padded = padded_heads(qkv)
    size = padded.query.shape[-1]
    grad_out, out = widened(grad_out, size), widened(out, size)
    grads = QKV(*(torch.zeros_like(x) for x in padded))
    for rows_q, rows_k in block.batches:
        rows = (rows_q, rows_k, rows_k)
        batch_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad_out, rows_q),
            *(_heads_first(x, i) for x, i in zip(padded, rows, strict=True)),
            _heads_first(out, rows_q),
            lse[rows_q].transpose(1, 2),
            dropout_p=0.0,
            is_causal=block.is_causal,
            scale=scale,
        )
        for grad, batch_grad, i in zip(grads, batch_grads, rows, strict=True):
            grad[i] = batch_grad.transpose(1, 2)
    return trimmed(grads, qkv)


def _heads_first(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Turn [tokens, heads, size] into [pieces, heads, tokens, size]; one piece is not copied."""
    is_alone = rows.shape[0] == 1
    pieces = x[rows[0, 0] : rows[0, -1] + 1].unsqueeze(0) if is_alone else x[rows]
    return pieces.transpose(1, 2)
