"""Compares attention backends over a context-parallel group with the definition on the whole row.

Groups take every ``n``-th rank, as Megatron's do when tensor parallelism is inside them, so that a
rank in the group is not its rank in the world; each group takes its share of the rows.

Ranks are forks of one process, on torch as it comes, without the stand-ins of ``megatron/cpu.py``.

Usage: python -m tests.invariance.ring_worker NUM_CASES OUTPUT.json CP_SIZE...
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megasft.attention.backend import BACKENDS
from megasft.attention.blocks import RowLayout
from megasft.cp_layout import zigzag_positions
from tests.attention_cases import SCALE, answer, longest, random_case, tensors

NUM_RANKS = 4


def main(num_cases: int, output: Path, cp_sizes: list[int]) -> None:
    rank = next((n for n in range(1, NUM_RANKS) if os.fork() == 0), 0)
    meeting = f"file://{output}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_RANKS)
    results = {cp_size: check_all(cp_size, num_cases) for cp_size in cp_sizes}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()
    if rank == 0:
        assert all(os.wait()[1] == 0 for _ in range(1, NUM_RANKS))


def check_all(cp_size: int, num_cases: int) -> dict[str, float]:
    """Run all rows over groups of one size; return counts and the largest errors."""
    num_groups = dist.get_world_size() // cp_size
    members = [list(range(g, dist.get_world_size(), num_groups)) for g in range(num_groups)]
    groups = [dist.new_group(ranks) for ranks in members]
    mine = dist.get_rank() % num_groups

    counts = {"rows": 0, "windows": 0, "single_document": 0, "shortest_document": 0}
    errors: dict[str, float] = {}
    for number in range(mine, num_cases, num_groups):
        check(number, groups[mine], counts, errors)

    names = sorted(errors)
    worst = torch.tensor([errors[name] for name in names], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    total = torch.tensor(list(counts.values()))
    dist.all_reduce(total)
    each_once = (total // cp_size).tolist()
    result = dict(zip(counts, each_once, strict=True))
    return result | dict(zip(names, worst.tolist(), strict=True))


def check(
    number: int, group: dist.ProcessGroup, counts: dict[str, int], errors: dict[str, float]
) -> None:
    """Run one row through the backends and keep the largest errors over the tolerance."""
    rank, cp_size = group.rank(), group.size()
    case = random_case(number, cp_size=cp_size)
    row = RowLayout(borders=case.borders, cp_rank=rank, cp_size=cp_size, device=torch.device("cpu"))
    borders = torch.tensor(case.borders)
    counts["rows"] += 1
    counts["windows"] += case.window is not None and case.window + 1 < longest(case)
    counts["single_document"] += len(case.borders) == 2
    counts["shortest_document"] += int(borders.diff().min()) == 2 * cp_size

    expected = answer(case)
    mine = torch.from_numpy(zigzag_positions(borders.numpy(), cp_rank=rank, cp_size=cp_size))
    *inputs, weight = (x[mine] for x in tensors(case, torch.float32))
    others = ("all_gather", "sdpa") if number % 8 < 2 or number % 8 == 7 else ()
    for name in ("ring", *others):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = BACKENDS[name](*leaves, row=row, scale=SCALE, window=case.window, group=group)
        (out * weight).sum().backward()
        results = (out, *(x.grad for x in leaves))
        for what, got, whole in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
            wanted = whole[mine]
            # Relative to 1 or to the value, whichever is larger: float32 has 7 digits.
            error = (got.double() - wanted).abs() / wanted.abs().clamp(min=1.0)
            key = f"{name} {what}"
            errors[key] = max(errors.get(key, 0.0), float(error.max()))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
