"""Builds models from flags and saves what their rope and attention are; started by torchrun.

Usage: torchrun --nproc-per-node N -m tests.unit.megatron.rope_worker RUNS.json FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megasft.megatron import cpu
from megasft.training import arguments


def start(flags: list[str]) -> Any:
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    args = arguments.parse(flags)
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    initialize_megatron()
    return args


def main() -> None:
    cpu.prepare()
    cpu.skip_missing_makefile()
    folder = Path(sys.argv[2])
    for number, flags in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.training import destroy_global_state

        from megasft.megatron.core_attention import PackedCoreAttention
        from megasft.megatron.model import model_config

        config = model_config(start(flags))
        builder = config.get_builder_cls()(config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = builder.build_distributed_models(groups, wrap_with_ddp=False)
        modules = [module for chunk in chunks for module in chunk.modules()]
        found = {
            "inv_freq": [chunk.rotary_pos_emb.rotary.inv_freq for chunk in chunks],
            "scale": [each.scale for each in modules if isinstance(each, PackedCoreAttention)],
        }
        torch.save(found, folder / f"{number}_{torch.distributed.get_rank()}.pt")
        torch.distributed.barrier()
        destroy_global_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
