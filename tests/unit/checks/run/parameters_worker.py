"""Builds models on a process group that sends nothing, and counts their parameters beside ours.

With torch's fake backend one process is any rank of any layout, one after another, so no rank waits
for another and a layout costs the milliseconds of building a small model.

Usage: python -m tests.unit.checks.run.parameters_worker FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasft.megatron import cpu

# tp, pp, ep, etp, virtual stages, multi-token prediction layers
LAYOUTS: Final = ((1, 1, 1, 1, 1, 0), (2, 2, 1, 2, 1, 0), (2, 2, 2, 1, 2, 0), (1, 2, 2, 1, 1, 1))

PLAIN: Final = (
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--max-position-embeddings", "128", "--padded-vocab-size", "256"),
)
"""GPT as Megatron makes it without further flags: biases, layer norm, learned positions."""


def main() -> None:
    cpu.prepare()
    cpu.skip_missing_makefile()
    seen = []
    for name, flags in all_flags(Path(sys.argv[1])).items():
        for tp, pp, ep, etp, chunks, mtp in LAYOUTS:
            is_moe, is_latent = "--num-experts" in flags, "--multi-latent-attention" in flags
            if (ep > 1 and not is_moe) or (tp > 1 and is_latent):
                continue
            split = layout_flags(tp, pp, ep if is_moe else 1, etp if is_moe else None, chunks)
            more = ["--mtp-num-layers", str(mtp)] if mtp else []
            for stage in range(pp):
                seen.append(
                    {"model": name, "layout": split + more}
                    | count(
                        [*flags, *split, *more], world_size=tp * pp * max(1, ep // tp), stage=stage
                    )
                )
    Path(sys.argv[1], "counts.json").write_text(json.dumps(seen))


def all_flags(folder: Path) -> dict[str, list[str]]:
    from checkpoint_convert.config_map import read_model
    from megasft.proof.families import FAMILIES, build

    found = {"plain GPT": list(PLAIN)}
    for name in FAMILIES:
        build(name, seed=0).save_pretrained(folder / name)
        found[name] = list(read_model(folder / name).flags)
    return found


def layout_flags(tp: int, pp: int, ep: int, etp: int | None, chunks: int) -> list[str]:
    flags = {
        "--tensor-model-parallel-size": tp,
        "--pipeline-model-parallel-size": pp,
        "--expert-model-parallel-size": ep,
    }
    flags |= {"--expert-tensor-parallel-size": etp} if etp else {}
    flags |= {"--num-virtual-stages-per-pipeline-rank": chunks} if chunks > 1 else {}
    listed = [text for flag, size in flags.items() for text in (flag, str(size))]
    return [*listed, *(["--sequence-parallel"] if tp > 1 else [])]


def count(flags: list[str], *, world_size: int, stage: int) -> dict[str, Any]:
    """Build one rank of a stage, and count what it holds, as built and as preflight says."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.arguments import validate_args

    from megasft.checks.run import parameters
    from megasft.megatron.model import model_config
    from megasft.training import arguments

    args = arguments.parse([*flags, "--seq-length", "64", "--micro-batch-size", "1"])
    args.world_size = world_size
    validate_args(args)
    pp = args.pipeline_model_parallel_size
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=stage * (world_size // pp), world_size=world_size
    )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        pp,
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    config = model_config(args)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = builder.build_distributed_models(groups, wrap_with_ddp=False)
    built = [(name, p.numel()) for chunk in chunks for name, p in chunk.named_parameters()]
    expert = sum(size for name, size in built if ".experts." in name)
    counted = parameters.of_stages(args, config.transformer)[stage].counts
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return {
        "stage": stage,
        "built": [sum(size for _, size in built) - expert, expert],
        "counted": list(counted),
        "whole": parameters.of_model(args).total,
    }


if __name__ == "__main__":
    main()
