"""Loads converted checkpoints with Megatron's own code and writes logits; started by torchrun.

Usage: torchrun --nproc-per-node N -m tests.unit.checkpoint_convert.load_worker CASES.json, a list
of {checkpoint, flags, tokens, logits}; the last rank writes ``logits``.
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
    """Build the model a training run builds from the flags, and load it as a run does."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint

    from megasft.training.model import model_config

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = model_config(args)
    config.parallel_output = False
    model = config.get_builder_cls()(config).build_model(groups)
    for tensor in (*model.parameters(), *expert_biases(model)):
        tensor.data.fill_(torch.nan)
    assert load_checkpoint([model], None, None) == (0, 0)
    return model.eval()


def expert_biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """Run one forward pass; None on all but the last pipeline stage.

    Args:
        tokens: int64 [rows, length]; the rows are laid end to end, as documents.

    Returns:
        float32 [rows, length, vocabulary].
    """
    from megatron.core import parallel_state

    from megasft.attention.core_attention import packed_row

    rows, length = tokens.shape
    borders = torch.arange(rows + 1, dtype=torch.int32) * length
    row = packed_row(borders, device=torch.device("cpu"), cp_rank=0, cp_size=1)
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(rows * length, 1, model.config.hidden_size)
        torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    positions = torch.arange(length).repeat(rows)
    with torch.no_grad():
        output = model(tokens.view(1, -1), positions[None], None, packed_seq_params=row)
    if parallel_state.is_pipeline_last_stage():
        return output.view(rows, length, -1)
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
        last_rank = torch.distributed.get_world_size() - 1
        output = logits(model, torch.tensor(case["tokens"]))
        if output is not None and torch.distributed.get_rank() == last_rank:
            torch.save(output, case["logits"])
        torch.distributed.barrier()
        destroy_global_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
