"""The flags of a run to come: those its checkpoint was saved with, and those given on top.

Megatron saves its flags as they are after validation, with what it derived from others filled in.
Validated again as they stand, some are refused (given twice) and some are stale (the size of an
expert's tensor parallelism after ``--tensor-model-parallel-size`` changed). So what is derived is
taken out first; ``_forget_derived`` is the list. Saving the command line too was rejected: the
checkpoint would still need its flags, and two truths can differ.
"""

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch

from megasft.errors import FlagError
from megasft.training.arguments import DEFAULT_FLAGS, add_arguments

DERIVED: Final = (
    *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
    *("encoder_num_layers", "encoder_seq_length", "overlap_p2p_comm", "align_param_gather"),
    *("finetune", "eval_iters", "ckpt_step"),
)
"""Flags that Megatron or megasft sets whatever the user says, or that are of one start only."""

SAME_AS: Final = {
    "expert_tensor_parallel_size": "tensor_model_parallel_size",
    "eval_global_batch_size": "global_batch_size",
    "eval_micro_batch_size": "micro_batch_size",
    "lr_decay_iters": "train_iters",
    "lr_decay_samples": "train_samples",
    "start_weight_decay": "weight_decay",
    "end_weight_decay": "weight_decay",
}
"""Flags that Megatron sets to another one when they are not given."""

FROM_EPOCHS: Final = {
    "train_iters": "megasft_epochs",
    "train_samples": "megasft_epochs",
    "save_interval": "megasft_save_epochs",
    "eval_interval": "megasft_eval_epochs",
}
"""Flags that are set when a length in epochs is given."""

EXCLUSIVE: Final = (
    ("train_iters", "train_samples", "megasft_epochs"),
    ("global_batch_size", "step_batch_size_schedule"),
    ("save_interval", "megasft_save_epochs"),
)
"""Of these one is given; a new one replaces the one saved."""

DTYPE_NAMES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_NOT_GIVEN: Final = object()


class FlagReader:
    """Reads flags as Megatron does, and tells those given from those left at their defaults."""

    def __init__(self) -> None:
        from megatron.training.arguments import add_megatron_arguments

        parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
        self.parser = add_arguments(add_megatron_arguments(parser))
        self.defaults = vars(self.parser.parse_args([*DEFAULT_FLAGS]))

    def given(self, flags: Sequence[str]) -> dict[str, Any]:
        """Return the values of these flags.

        Raises:
            FlagError: One is unknown, or its value is not one of its kind.
        """
        nothing = argparse.Namespace(**dict.fromkeys(self.defaults, _NOT_GIVEN))
        try:
            namespace, unknown = self.parser.parse_known_args(list(flags), nothing)
        except argparse.ArgumentError as error:
            raise FlagError(f"{error}; give the flags of the run to come") from error
        if unknown:
            raise FlagError(
                f"{' '.join(unknown)} is no flag of Megatron, of megasft or of this command"
            )
        return {name: v for name, v in vars(namespace).items() if v is not _NOT_GIVEN}

    def name_of(self, flag: str) -> str:
        """Return the name under which a flag's value is kept.

        Raises:
            FlagError: There is no such flag.
        """
        wanted = "--" + flag.lstrip("-")
        for action in self.parser._actions:
            if wanted in action.option_strings:
                return action.dest
        raise FlagError(f"--without {flag}: Megatron and megasft have no flag {wanted}")

    def flag_of(self, name: str) -> str:
        """Return the flag whose value is kept under a name."""
        options = (a.option_strings[-1] for a in self.parser._actions if a.dest == name)
        return next(options, name)


def complete(saved: Any, reader: FlagReader) -> argparse.Namespace:
    """Return saved flags with the defaults of those that did not exist then."""
    return argparse.Namespace(**(reader.defaults | deepcopy(vars(saved))))


def merge(
    saved: Any,
    given: Mapping[str, Any],
    reader: FlagReader,
    *,
    without: Sequence[str],
    world_size: int | None,
) -> argparse.Namespace:
    """Return the flags of the run to come, as they are before Megatron validates them.

    Args:
        saved: Flags of the checkpoint.
        given: Values on top of them, by name.
        reader: Knows the flags.
        without: Names of saved flags that are not given any more.
        world_size: Ranks of the run to come; those of the checkpoint if not given.
    """
    values = {name: deepcopy(v) for name, v in vars(saved).items() if name in reader.defaults}
    _forget_derived(values, saved, reader.defaults)
    for names in EXCLUSIVE:
        if any(name in given for name in names):
            values |= {name: reader.defaults[name] for name in names}
    values |= {name: reader.defaults[name] for name in without}
    args = argparse.Namespace(**(reader.defaults | values | dict(given)))
    # What Megatron's parser adds; see parse_args in megatron.training.arguments, 0.19.2.
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank, args.world_size = 0, world_size or int(saved.world_size)
    return args


def _forget_derived(values: dict[str, Any], saved: Any, defaults: Mapping[str, Any]) -> None:
    """Give what was not said by the user its default back, in place."""
    derived = [*DERIVED]
    derived += [name for name, other in SAME_AS.items() if values.get(name) == values.get(other)]
    derived += [name for name, epochs in FROM_EPOCHS.items() if values.get(epochs) is not None]
    if values.get("train_samples") is not None:
        derived.append("train_iters")
    if not saved._is_global_batch_size_explicitly_specified:
        derived += ["global_batch_size", "eval_global_batch_size"]
    values |= {name: defaults[name] for name in derived if name in defaults}
    for name, value in values.items():
        if isinstance(value, torch.dtype):
            values[name] = DTYPE_NAMES.get(value, defaults[name])
        elif name.startswith("megatron_fsdp_") and value is None:
            values[name] = defaults[name]  # "auto", which Megatron maps to None
