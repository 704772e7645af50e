"""Runs converted checkpoints forward with the model a training run builds, and writes logits.

A verification is given this module and starts it, on the CPU wherever it runs, so that the same
comparison is made on a laptop and on a cluster.

Usage: torchrun --nproc-per-node N -m megasft.run.forward_worker JOBS.json, a list of the fields of
``megatron.forward.Case``.
"""

from pathlib import Path
from typing import Any

import orjson
import torch

from megasft.megatron import worker
from megasft.megatron.forward import (
    Case,
    build,
    forward,
    initialize,
    load_whole,
    require_same_model,
)
from megasft.megatron.layerwise import forward_by_layer
from megasft.run.start import accept
from megasft.training import arguments


def start(case: Case) -> tuple[Any, Any]:
    """Start as a training run does, without data; return Megatron's args and the model's config."""
    args = arguments.parse(case.all_flags())
    longest = max(map(len, case.documents))
    # Rows are as long as their documents together; Megatron only checks this one.
    args.seq_length = max(8, min(longest, args.max_position_embeddings or longest) // 8 * 8)
    config = accept(args)
    initialize(args)
    return args, config


def run(job: dict[str, Any]) -> None:
    """Do what a case asks for and write its files, from the last rank."""
    case = Case(**job)
    output = Path(case.output)
    args, config = start(case)
    require_same_model(args, case)
    if case.hidden is not None:
        logits, layers = forward_by_layer(config, case)
        output.with_suffix(".layers").write_bytes(
            orjson.dumps(layers, option=orjson.OPT_SERIALIZE_NUMPY)
        )
        worker.write_whole(logits, output)
        return
    model = build(config)
    load_whole(model, case)
    found = forward(model, case)
    if found is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        worker.write_whole(found, output)


if __name__ == "__main__":
    worker.work(run, stays_after=None)
