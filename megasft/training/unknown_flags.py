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
    parts = [f"{flag} is no flag of Megatron or megasft{_nearest(flag, known)}" for flag in unknown]
    return ". ".join(parts)


def _nearest(flag: str, known: Sequence[str]) -> str:
    dashed = flag.replace("_", "-")
    found = [dashed] if dashed in known else get_close_matches(dashed, known, n=1, cutoff=0.6)
    return f"; the nearest is {found[0]}" if found else "; --help lists all"
