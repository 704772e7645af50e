"""The ring's arithmetic in one process: ranks are threads, and messages go through queues."""

from collections import defaultdict
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megasft.attention import ring
from megasft.attention.blocks import RowLayout, Step
from megasft.attention.blockwise import KeyValue
from megasft.cp_layout import zigzag_positions
from tests.attention_cases import SCALE, Case, answer, tensors

CP_SIZE, CPU = 8, torch.device("cpu")
CASE = Case(borders=(0, 128, 160), groups=1, ratio=2, sizes=(16, 16), window=None, seed=3)
# What one rounding changes at most, of the value: half a unit in the last of 8 or 24 bits.
BF16_ROUNDING, FLOAT32_ROUNDING = 2.0**-8, 2.0**-24


class Rank(NamedTuple):
    """Stands in for a context-parallel group as one rank sees it; mailboxes are by rank and tag."""

    number: int
    mailboxes: dict[tuple[int, int], SimpleQueue[torch.Tensor]]

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return CP_SIZE


class Arrival(NamedTuple):
    """A receive under way."""

    mailbox: SimpleQueue[torch.Tensor]
    received: torch.Tensor

    def wait(self) -> None:
        self.received.copy_(self.mailbox.get(timeout=60))


def share(rank: int) -> torch.Tensor:
    """Return the row positions that a rank owns."""
    positions = zigzag_positions(np.array(CASE.borders), cp_rank=rank, cp_size=CP_SIZE)
    return torch.from_numpy(positions)


def train_in_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[int, set[torch.dtype]]]:
    """Run every rank's forward and backward.

    Returns:
        Output, dq, dk and dv of the whole row; and the types of what traveled, by tag.
    """
    sent: dict[int, set[torch.dtype]] = {ring.KEYS_TAG: set(), ring.GRADS_TAG: set()}
    boxes = {(rank, tag): SimpleQueue[torch.Tensor]() for rank in range(CP_SIZE) for tag in sent}

    def pass_on(flat: torch.Tensor, group: Rank, *, tag: int) -> ring._Message:
        sent[tag].add(flat.dtype)
        boxes[(group.rank() + 1) % CP_SIZE, tag].put(flat.clone())
        received = torch.empty_like(flat)
        works: Any = [Arrival(boxes[group.rank(), tag], received)]
        return ring._Message(flat, received, works)

    monkeypatch.setattr(ring, "_pass_on", pass_on)
    whole = [torch.full_like(x, torch.nan) for x in tensors(CASE, dtype)]
    *inputs, weight = tensors(CASE, dtype)
    results = [whole[3], *whole[:3]]

    def train(rank: int) -> None:
        cut = share(rank)
        row = RowLayout(borders=CASE.borders, cp_rank=rank, cp_size=CP_SIZE, device=CPU)
        leaves = [x[cut].requires_grad_() for x in inputs]
        group: Any = Rank(rank, boxes)
        out = ring.ring_attention(*leaves, row=row, scale=SCALE, window=None, group=group)
        grads = torch.autograd.grad((out * weight[cut]).sum(), leaves)
        for result, part in zip(results, (out, *grads), strict=True):
            result[cut] = part.detach()

    threads = [Thread(target=train, args=(rank,)) for rank in range(CP_SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, sent


def test_every_share_meets_every_other_and_its_gradients_come_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = train_in_threads(monkeypatch, torch.float64)
    wanted = answer(CASE, rounded=torch.float64)
    for name, got, exact in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        error = float((got - exact).abs().max())
        assert error < 1e-11 * max(1.0, float(exact.abs().max())), name


def test_keys_travel_in_bfloat16_and_their_gradients_are_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the sum is rounded to bfloat16 once, at home, and not at every hop."""
    of_step, parts = ring.Backward.of_step, defaultdict[int, list[torch.Tensor]](list)

    def keep(backward: ring.Backward, step: Step, other: KeyValue, grads: KeyValue) -> None:
        of_step(backward, step, other, grads)
        parts[step.source].append(torch.cat(grads, dim=-1).double())

    monkeypatch.setattr(ring.Backward, "of_step", keep)
    (_, _, *found), sent = train_in_threads(monkeypatch, torch.bfloat16)
    assert sent == {ring.KEYS_TAG: {torch.bfloat16}, ring.GRADS_TAG: {torch.float32}}
    for rank in range(CP_SIZE):
        home = torch.cat(found, dim=-1)[share(rank)].double()
        each = torch.stack(parts[rank])
        assert len(each) == CP_SIZE and each.any(dim=(1, 2, 3)).all()
        allowed = BF16_ROUNDING * each.sum(0).abs() + CP_SIZE * FLOAT32_ROUNDING * each.abs().sum(0)
        assert ((home - each.sum(0)).abs() <= allowed).all()
