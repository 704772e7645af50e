"""One clear error for flags that do not parse, with the nearest flag there is.

Megatron's parser answers a misspelt flag with the usage of a thousand flags and exits with 2. Its
``extra_args_provider`` hook hands us the parser itself, so its way to fail can be said there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Final, NoReturn

from megasft.errors import FlagError

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

_UNKNOWN: Final = "unrecognized arguments: "

OTHER_NAMES: Final = {
    "learning_rate": "--lr",
    "lr_scheduler_type": "--lr-decay-style",
    "warmup_ratio": "--lr-warmup-fraction",
    "warmup_steps": "--lr-warmup-iters",
    "max_grad_norm": "--clip-grad",
    "adam_epsilon": "--adam-eps",
    "per_device_train_batch_size": "--micro-batch-size",
    "per_device_eval_batch_size": "--eval-micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "num_train_epochs": "--megasft-epochs",
    "max_steps": "--train-iters",
    "max_seq_length": "--seq-length",
    "max_length": "--seq-length",
    "cutoff_len": "--seq-length",
    "output_dir": "--save",
    "save_steps": "--save-interval",
    "save_total_limit": "--megasft-keep-last",
    "resume_from_checkpoint": "--load",
    "eval_steps": "--eval-interval",
    "logging_steps": "--log-interval",
    "logging_dir": "--tensorboard-dir",
    "gradient_checkpointing": "--recompute-granularity",
    "dataloader_num_workers": "--num-workers",
    "train_file": "--megasft-data",
    "dataset_name": "--megasft-data",
    "model_name_or_path": "--megasft-hf",
}
"""Names of transformers, TRL and LLaMA-Factory, and the flag that says it here."""

NOTES: Final = {
    "gradient_accumulation_steps": "the micro-batch size x data-parallel ranks x these steps",
    "gradient_checkpointing": "full or selective",
    "train_file": "a store made by `megasft build`",
    "dataset_name": "a store made by `megasft build`",
}
"""What else is to be known about some of them."""


def clear_errors(add_arguments: Provider) -> Provider:
    """Return the provider with parse errors raised as one message.

    Args:
        add_arguments: Adds our flags to Megatron's parser.
    """

    def with_clear_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(parser)

        def error(message: str) -> NoReturn:
            raise FlagError(describe(message, parser))

        parser.error = error  # type: ignore[method-assign]
        return parser

    return with_clear_errors


def describe(message: str, parser: argparse.ArgumentParser) -> str:
    """Return what a user reads instead of argparse's message and usage.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--seq-length")
        >>> describe("unrecognized arguments: --sequence-length 512", parser)
        '--sequence-length is no flag of Megatron or megasft; the nearest is --seq-length'
    """
    if not message.startswith(_UNKNOWN):
        return f"{message}; see `python -m megasft.pretrain_sft --help`"
    tokens = message.removeprefix(_UNKNOWN).split()
    unknown = [token.partition("=")[0] for token in tokens if token.startswith("-")]
    if not unknown:
        return f"{' '.join(tokens)} belongs to no flag; drop it, or quote a value with spaces"
    known = [flag for action in parser._actions for flag in action.option_strings]
    parts = [f"{flag} is no flag of Megatron or megasft; {_hint(flag, known)}" for flag in unknown]
    return ". ".join(parts)


def other_name(key: str, here: str) -> str:
    """Return what a name of another tool is here, with what else is to be known.

    Args:
        key: A name of ``OTHER_NAMES``.
        here: How its flag is spelled where it was looked for.

    Example:
        >>> other_name("learning_rate", "optim.lr")
        'here it is optim.lr'
    """
    note = f" ({NOTES[key]})" if key in NOTES else ""
    return f"here it is {here}{note}"


def _hint(flag: str, known: Sequence[str]) -> str:
    key = flag.removeprefix("--").replace("-", "_")
    if key in OTHER_NAMES:
        return other_name(key, OTHER_NAMES[key])
    dashed = flag.replace("_", "-")
    found = [dashed] if dashed in known else get_close_matches(dashed, known, n=1, cutoff=0.6)
    return f"the nearest is {found[0]}" if found else "--help lists all"
