"""What any rank of Megatron imports, to be imported once before ranks are forked."""

import argparse
import importlib
from typing import Final

from megasft.megatron import cpu, flags

IMPORTED: Final = (
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.text_tokenizer",
    "megatron.training.argument_utils",
    "megatron.training.checkpointing",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
"""Imported late by Megatron, inside of functions."""


def prepare() -> None:
    """Import it all, and read the help of Megatron's flags."""
    cpu.prepare()
    cpu.skip_missing_makefile()
    cpu.remember_docstrings()
    for name in IMPORTED:
        importlib.import_module(name)
    # Ranks inherit the docstrings that Megatron's parser takes the help of its flags from.
    flags.add_flags(argparse.ArgumentParser())
