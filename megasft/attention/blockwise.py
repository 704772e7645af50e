"""Attention of one share as a sum of blocks: own keys first, then those of the other ranks.

Only Q, K, V, the merged output and the log-sum-exp are kept for backward, all linear in the row;
every block's probabilities are computed again. How the other ranks' keys get here is not decided in
this file: the ring hands them over one by one, ``all_gather`` all at once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasft.attention.blocks import Step
from megasft.attention.kernels.choice import KERNELS, choose
from megasft.attention.kernels.kernel import QKV
from megasft.attention.online_softmax import accumulator_dtype, merge


class KeyValue(NamedTuple):
    """One rank's keys and values, or their gradients.

    Attributes:
        key: float [T, G, E].
        value: float [T, G, F].
    """

    key: torch.Tensor
    value: torch.Tensor


class Plan(NamedTuple):
    """What a share's attention is made of, beside its tensors.

    Attributes:
        steps: From ``RowLayout.steps``; own keys first.
        scale: Multiplies the scores.
        kernel: Name of the block kernel.
    """

    steps: tuple[Step, ...]
    scale: float
    kernel: str


def plan(query: torch.Tensor, own: KeyValue, steps: tuple[Step, ...], *, scale: float) -> Plan:
    """Choose the block kernel for these tensors."""
    return Plan(steps, scale, choose(QKV(query, *own), steps[0].block))


def attend(
    query: torch.Tensor, arrivals: Iterable[KeyValue], plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys of every step and merge, in the order they arrive.

    Args:
        query: float [T, H, E]. This rank's share.
        arrivals: Keys and values of the steps' sources, one per step.
        plan: The steps.

    Returns:
        ``(out, lse)``: dtype of ``query`` [T, H, F]; float32 or float64 [T, H].
    """
    kernel, merged = KERNELS[plan.kernel], None
    for step, other in zip(plan.steps, arrivals, strict=True):
        qkv = _of_block(query, other, step)
        out, lse = kernel.forward(qkv, step.block, scale=plan.scale)
        if merged is None:
            # Own keys: every query sees itself, so no log-sum-exp is -inf from here on.
            dtype = query.dtype if len(plan.steps) == 1 else accumulator_dtype(query.dtype)
            merged = out.to(dtype), lse.contiguous()
        else:
            merge(*merged, out, lse, rows=step.q_rows)
    assert merged is not None
    return merged[0].to(query.dtype), merged[1]


class Backward:
    """Adds up the gradients of a share's queries while the steps are differentiated one by one."""

    def __init__(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Plan,
    ) -> None:
        self.grad_out, self.query, self.out, self.lse = grad_out.contiguous(), query, out, lse
        self.plan = plan
        dtype = accumulator_dtype(query.dtype)
        self.grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device)

    def of_step(self, step: Step, other: KeyValue, grads: KeyValue) -> None:
        """Differentiate one step.

        Args:
            step: Whose keys.
            other: They and their values.
            grads: float32 or float64. What is added to: their gradients.
        """
        rows = step.q_rows
        grad_out, out, lse = (_take(x, rows) for x in (self.grad_out, self.out, self.lse))
        qkv = _of_block(self.query, other, step)
        kernel = KERNELS[self.plan.kernel]
        block_grads = kernel.backward(grad_out, qkv, out, lse, step.block, scale=self.plan.scale)
        _add(self.grad_query, block_grads.query, rows)
        _add(grads.key, block_grads.key, step.k_rows)
        _add(grads.value, block_grads.value, step.k_rows)


class SharesAtHand(Function):
    """Attention to shares that are all on this rank."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Plan
    ) -> torch.Tensor:
        """See ``attend_to_shares``."""
        arrivals = (KeyValue(keys[step.source], values[step.source]) for step in plan.steps)
        out, lse = attend(query, arrivals, plan)
        ctx.save_for_backward(query, keys, values, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Differentiate the steps again one by one."""
        query, keys, values, out, lse = ctx.saved_tensors
        backward = Backward(grad_out, query, out, lse, ctx.plan)
        dtype = backward.grad_query.dtype
        grads = KeyValue(
            *(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values))
        )
        for step in ctx.plan.steps:
            source = step.source
            other = KeyValue(keys[source], values[source])
            backward.of_step(step, other, KeyValue(grads.key[source], grads.value[source]))
        grad_query = backward.grad_query.to(query.dtype)
        return grad_query, grads.key.to(keys.dtype), grads.value.to(values.dtype), None


def attend_to_shares(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    steps: tuple[Step, ...],
    *,
    scale: float,
) -> torch.Tensor:
    """Attend to the keys of all ranks, which are all here.

    Args:
        query: float [T, H, E]. This rank's share.
        keys: float [cp_size, T, G, E]. By rank, each in its share's order.
        values: float [cp_size, T, G, F].
        steps: From ``RowLayout.steps``.
        scale: Multiplies the scores.

    Returns:
        float [T, H, F], dtype of ``query``.
    """
    own = KeyValue(keys[steps[0].source], values[steps[0].source])
    chosen = plan(query, own, steps, scale=scale)
    context: torch.Tensor = SharesAtHand.apply(query, keys, values, chosen)  # type: ignore[no-untyped-call]
    return context


def _of_block(query: torch.Tensor, other: KeyValue, step: Step) -> QKV:
    return QKV(_take(query, step.q_rows), *(_take(x, step.k_rows) for x in other))


def _take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x[rows]


def _add(total: torch.Tensor, part: torch.Tensor, rows: torch.Tensor | None) -> None:
    part = part.to(total.dtype)
    if rows is None:
        total += part
    else:
        total.index_add_(0, rows, part)
