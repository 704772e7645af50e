"""Megatron's own flags: its parser, its validation, and what we read from them about attention.

Megatron reads ``sys.argv`` and offers a hook for flags of a plug-in; here both are one function.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

AddFlags = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Adds flags to a parser and returns it."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of Megatron's flags to a parser."""
    from megatron.training.arguments import add_megatron_arguments

    add_megatron_arguments(parser)


def parse(argv: Sequence[str], add_ours: AddFlags) -> Any:
    """Parse Megatron's flags and ours; nothing is validated.

    Args:
        argv: Flags, without the program's name.
        add_ours: Adds the flags that Megatron does not have.

    Returns:
        The namespace Megatron calls ``args``.
    """
    from megatron.training.arguments import parse_args

    previous, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        return parse_args(add_ours)
    finally:
        sys.argv = previous


def validate(args: Any, printed: io.StringIO) -> None:
    """Let Megatron validate its flags and derive every default.

    Args:
        args: The namespace; it is changed.
        printed: Takes what Megatron prints: all flags, one a line, or why it exits.

    Raises:
        Exception: Megatron asserts, raises and exits (``SystemExit``) as it likes.
    """
    from megatron.training.arguments import validate_args

    with contextlib.redirect_stdout(printed):
        validate_args(args)


def publish(args: Any) -> None:
    """Make validated flags those of this process, as Megatron's functions read them.

    Its tokenizer is left out: nothing reads it, and importing its libraries takes seconds.
    """
    from megatron.training.global_vars import set_global_variables

    set_global_variables(args, build_tokenizer=False)


def uses_te_spec(args: Any) -> bool:
    """Say whether the layers are Transformer Engine's."""
    return str(args.transformer_impl) == "transformer_engine"


def attention_backend(args: Any) -> str | None:
    """Return the name of our backend, or None when Transformer Engine attends."""
    if args.megasft_attention == "auto":
        return None if uses_te_spec(args) else "ring"
    return None if args.megasft_attention == "te" else str(args.megasft_attention)
