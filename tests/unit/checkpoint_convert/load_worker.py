"""Loads converted checkpoints with Megatron's own code and writes logits; started by torchrun.

Usage: torchrun --nproc-per-node N -m tests.unit.checkpoint_convert.load_worker CASES.json, a list
of {checkpoint, flags, tokens, logits}; the last pipeline stage writes ``logits``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megasft import cpu
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


def load_model(args: Any) -> torch.nn.Module:
    """Build the model from the flags and load it as a training run does."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = gpt_config_from_args(args)
    config.parallel_output = False
    model = GPTModelBuilder(config).build_model(groups)
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    assert load_checkpoint([model], None, None) == (0, 0)
    return model.eval()


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run one forward pass; None on all but the last pipeline stage."""
    from megatron.core import parallel_state

    rows, length = tokens.shape
    is_hidden = torch.ones(1, 1, length, length).triu(1).bool()
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(length, rows, model.config.hidden_size)
        torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    with torch.no_grad():
        output = model(tokens, torch.arange(length).expand(rows, -1), is_hidden)
    if parallel_state.is_pipeline_last_stage():
        return output
    torch.distributed.send(
        output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
    )
    return None


def main() -> None:
    cpu.prepare()
    cpu.skip_missing_makefile()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        from megatron.training.training import destroy_global_state

        model = load_model(start([*case["flags"], "--megasft-hf", case["checkpoint"]]))
        output = logits(model, torch.tensor(case["tokens"]))
        if output is not None:
            torch.save(output, case["logits"])
        torch.distributed.barrier()
        destroy_global_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
