"""Ring attention: keys and values travel round the context-parallel group, queries stay.

In step ``s`` rank ``r`` holds the keys and values of rank ``(r - s) % cp_size`` and attends to them
while the next share is on its way: sends and receives are posted before the block is computed and
waited for after it. Backward goes round once more; the gradients of a share travel one step behind
it, every rank adds its own part, and after ``cp_size`` steps they are home.

Per layer that is ``cp_size - 1`` messages of one share forward, and in backward as many again plus
``cp_size`` of its gradients, which are float32 so that their sum does not depend on the rounding of
each hop. A rank holds a few shares, however many ranks there are: memory is linear in the share.
``all_gather`` needs fewer messages and the whole row's keys. Only the ``G`` key/value heads travel.
With NCCL the messages run beside the kernels; gloo moves them in its own threads.

Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023, arXiv:2310.01889. The cut of
a causal document into balanced slices is that of ``cp_layout``.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasft.attention.blocks import RowLayout
from megasft.attention.blockwise import Backward, KeyValue, Plan, attend, attend_to_shares, plan

KEYS_TAG, GRADS_TAG = 1, 2
"""Two messages to the same neighbour are under way at once; NCCL goes by their order alone."""


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row: RowLayout,
    scale: float,
    window: int | None,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Attend while keys and values go round; see ``AttentionBackend``."""
    steps = row.steps(window)
    if row.cp_size == 1:
        return attend_to_shares(query, key.unsqueeze(0), value.unsqueeze(0), steps, scale=scale)
    chosen = plan(query, KeyValue(key, value), steps, scale=scale)
    context: torch.Tensor = _Ring.apply(  # type: ignore[no-untyped-call]
        query, key, value, chosen, group
    )
    return context


class _Ring(Function):
    """Attention to shares that pass by."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        out, lse = attend(query, _passing_by(KeyValue(key, value), group), plan)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.group = plan, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        backward = Backward(grad_out, query, out, lse, ctx.plan)
        like, dtype = KeyValue(key, value), backward.grad_query.dtype
        behind: _Message | None = None
        passing = _passing_by(like, ctx.group)
        for step, other in zip(ctx.plan.steps, passing, strict=True):
            flat = torch.zeros(key.numel() + value.numel(), dtype=dtype, device=key.device)
            backward.of_step(step, other, _unflatten(flat, like))
            if behind is not None:
                flat += behind.wait()
            behind = _pass_on(flat, ctx.group, tag=GRADS_TAG)
        assert behind is not None
        grads = _unflatten(behind.wait(), like)
        grad_query = backward.grad_query.to(query.dtype)
        return grad_query, grads.key.to(key.dtype), grads.value.to(value.dtype), None, None


def _passing_by(own: KeyValue, group: dist.ProcessGroup) -> Iterator[KeyValue]:
    """Yield this rank's keys and values, then the others', the next ones being under way."""
    flat = torch.cat([x.reshape(-1) for x in own])
    for _ in range(group.size() - 1):
        message = _pass_on(flat, group, tag=KEYS_TAG)
        yield _unflatten(flat, own)
        flat = message.wait()
    yield _unflatten(flat, own)


class _Message(NamedTuple):
    """A tensor being sent to the next rank while the previous rank's is received.

    Attributes:
        sent: Kept alive until it has left.
        received: What comes; not to be read before ``wait``.
        works: The send and the receive.
    """

    sent: torch.Tensor
    received: torch.Tensor
    works: list[dist.Work]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _pass_on(flat: torch.Tensor, group: dist.ProcessGroup, *, tag: int) -> _Message:
    """Post a send to the next rank of the context-parallel group and a receive from the previous.

    Args:
        flat: float [N]. Contiguous, because gloo corrupts other tensors silently (torch 2.13).
        group: The context-parallel group: the ranks that share the row.
        tag: Which of the two messages under way this is.
    """
    rank, size = group.rank(), group.size()
    received = torch.empty_like(flat)
    following, previous = (dist.get_global_rank(group, (rank + n) % size) for n in (1, -1))
    operations = [
        dist.P2POp(dist.isend, flat, following, group, tag),
        dist.P2POp(dist.irecv, received, previous, group, tag),
    ]
    return _Message(flat, received, dist.batch_isend_irecv(operations))


def _unflatten(flat: torch.Tensor, like: KeyValue) -> KeyValue:
    """Return views of a flat tensor, shaped as keys and values."""
    key, value = torch.split(flat, [x.numel() for x in like])
    return KeyValue(key.view(like.key.shape), value.view(like.value.shape))
