"""One rank of any layout in this process: Megatron's real groups and flags, and nothing is sent.

torch's fake backend stands for the other ranks; what a collective returns is what was put in. So a
test sees what one rank does, and adds up ranks by itself, without the seconds a process takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from megasft.megatron import cpu

MODEL: Final = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--max-position-embeddings", "64", "--padded-vocab-size", "256", "--seq-length", "64"),
    *("--position-embedding-type", "rope", "--micro-batch-size", "1"),
)
"""Flags of a model that is never built."""


def validated(*flags: str, world_size: int = 1) -> Any:
    """Return flags of a run as Megatron's own validation leaves them; later ones win."""
    cpu.prepare()
    from megatron.training.arguments import validate_args

    from megasft.training import arguments

    args = arguments.parse([*MODEL, *flags])
    args.world_size = world_size
    validate_args(args)
    return args


@contextmanager
def one_rank(args: Any, rank: int = 0) -> Iterator[None]:
    """Be a rank of the layout that validated flags describe."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    args.rank = rank
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=args.world_size
    )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        create_gloo_process_groups=False,
    )
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
    )
    try:
        yield
    finally:
        num_microbatches_calculator.unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
