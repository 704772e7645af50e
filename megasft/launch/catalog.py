"""Which keys a run.yaml may have, and the command-line flags they become.

The rule, in full. A key is a flag's own name, with underscores or dashes, in whatever section the
reader looks for it: sections group, they do not rename. Ours drop ``megasft-`` where Megatron has
no flag of that name. ``SHORT_NAMES`` has the few keys with a better name, ``OWN_KEYS`` and
``Launch`` those that are no flags; these have one section each. The catalog is read from argparse's
own actions, so a flag of a newer Megatron is a key at once; a list of keys here would be wrong
within a release. Cost: Megatron has to be imported (3 s) before a key can be checked.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NoReturn

from megasft.errors import FlagError
from megasft.megatron.flags import add_flags
from megasft.training.unknown_flags import OTHER_NAMES, other_name

SECTIONS: Final = (
    *("launch", "model", "data", "loss", "parallel", "optim", "checkpoint", "log", "eval"),
)
LAUNCH: Final = "launch"

SHORT_NAMES: Final = {
    ("data", "store"): "--megasft-data",
    ("data", "valid"): "--megasft-valid-data",
    ("loss", "objective"): "--megasft-loss",
}
"""Keys of one section that stand for a flag of another name."""

OWN_KEYS: Final = {
    ("model", "hf"): "Hugging Face folder, converted on first use and then cached, or a checkpoint "
    "that `megasft convert hf-to-megatron` wrote; gives the model's flags and first weights",
    ("model", "cache"): "folder of converted checkpoints (default: beside checkpoint.save)",
    (
        "model",
        "verify",
    ): "false: do not compare what is converted, there and back, with its source; "
    "the comparison runs both models on the CPU (default: true)",
    ("checkpoint", "resume"): "auto: go on from checkpoint.save when it holds a checkpoint; never: "
    "do not load (default: auto)",
    ("checkpoint", "export_hf"): "when training is complete, convert to Hugging Face: a folder, or "
    "true for that of checkpoint.save with -hf at its end",
}
"""Keys that are no flags, and what they mean."""

_USUAL_SECTIONS: Final = {
    **dict.fromkeys(("seq_length", "micro_batch_size", "global_batch_size", "num_workers"), "data"),
    **dict.fromkeys(("save", "save_interval", "keep_last", "load"), "checkpoint"),
    **dict.fromkeys(("eval_interval", "eval_micro_batch_size"), "eval"),
    **dict.fromkeys(("log_interval", "tensorboard_dir"), "log"),
    "recompute_granularity": "parallel",
}
"""Where one looks for keys that other tools name otherwise, but for ``optim``; any will do."""

_HF_FLAG: Final = "--megasft-hf"
_PREFIX: Final = "--megasft-"
_NEGATIONS: Final = ("no_", "disable_")
_BOOLEAN: Final = (argparse._StoreTrueAction, argparse._StoreFalseAction)


class RefusedError(Exception):
    """What argparse has against a value; its caller knows the key and the line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedError(message.partition(": ")[2] or message)


@dataclass(frozen=True, slots=True)
class Spelling:
    """One key of a flag.

    Attributes:
        option: The flag.
        is_negated: Whether the key says the opposite of the flag, as ``rope_fusion`` does of
            ``--no-rope-fusion``.
    """

    option: str
    action: argparse.Action
    is_negated: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether its value is true or false."""
        return isinstance(self.action, (*_BOOLEAN, argparse.BooleanOptionalAction))

    @property
    def kind(self) -> str:
        """What its value is, for people."""
        if self.is_switch:
            return "true|false"
        if self.action.choices is not None:
            one = "|".join(str(choice) for choice in self.action.choices)
        else:
            one = getattr(self.action.type, "__name__", "str")
        return f"list of {one}" if self.action.nargs is not None else one


class Catalog:
    """Every flag of Megatron's parser and of ours, by key.

    Args:
        preset: Flags that are set before the user's own: our defaults, the model's.
    """

    def __init__(self, preset: Sequence[str] = ()) -> None:
        self._parser = _whole_parser()
        self._preset = self._parser.parse_args(list(preset))
        self._spellings: dict[str, Spelling] = {}
        for action in self._parser._actions:
            self._add(action)
        self._add_opposites()
        self._add_ours()

    def _add(self, action: argparse.Action) -> None:
        is_pair = isinstance(action, argparse.BooleanOptionalAction)
        for option in action.option_strings:
            if option != _HF_FLAG and not (is_pair and option.startswith("--no-")):
                self._spellings[_key(option)] = Spelling(option, action)

    def _add_opposites(self) -> None:
        for key, spelling in list(self._spellings.items()):
            if not isinstance(spelling.action, argparse._StoreFalseAction):
                continue
            for negation in _NEGATIONS:
                if key.startswith(negation):
                    positive = Spelling(spelling.option, spelling.action, is_negated=True)
                    self._spellings.setdefault(key.removeprefix(negation), positive)

    def _add_ours(self) -> None:
        for key, spelling in list(self._spellings.items()):
            if spelling.option.startswith(_PREFIX):
                self._spellings.setdefault(key.removeprefix("megasft_"), spelling)

    def find(self, section: str, key: str) -> Spelling:
        """Return the flag a key stands for.

        Raises:
            FlagError: There is none; the message names the nearest, or the section it belongs in.
        """
        if (flag := SHORT_NAMES.get((section, key))) is not None:
            return self._spellings[_key(flag)]
        if key in self._spellings and section != LAUNCH:
            return self._spellings[key]
        homes = [s for s, k in (*OWN_KEYS, *SHORT_NAMES, *launch_keys()) if k == key]
        if homes:
            raise FlagError(f"{key} belongs in the section {homes[0]}, not in {section}")
        if key in self._spellings:
            raise FlagError(
                f"{key} is a flag of the training, and {LAUNCH} is about starting it; put it in "
                "another section"
            )
        if key == _key(_HF_FLAG):
            raise FlagError("megasft_hf is model.hf here")
        if key in OTHER_NAMES:
            raise FlagError(f"unknown key {key}; {here(key)}")
        raise FlagError(f"unknown key {key}{self._nearest(section, key)}")

    def _nearest(self, section: str, key: str) -> str:
        homes = {k: s for s, k in (*OWN_KEYS, *SHORT_NAMES, *launch_keys())}
        here = [k for k, s in homes.items() if s == section]
        names = here if section == LAUNCH else [*here, *self._spellings]
        close = [
            *(name for name in here if name.startswith(key)),
            *difflib.get_close_matches(key, names, n=1),
            *difflib.get_close_matches(key, [*homes, *self._spellings], n=1),
        ]
        if not close:
            return "; `megasft train --keys PART` lists those that hold a part of a name"
        home = section if close[0] in names else homes.get(close[0], "model")
        return f"; did you mean {home}.{close[0]}?"

    def flags(self, spelling: Spelling, value: Any) -> list[str]:
        """Return the command-line flags for a value; none where leaving the flag out says it.

        Args:
            spelling: What ``find`` returned.
            value: Of YAML: true, false, a number, a string, or a list of these.

        Raises:
            FlagError: The flag takes no such value, or cannot be switched off.
        """
        if spelling.is_switch:
            return self._switched(spelling, value)
        if isinstance(value, (bool, dict)):
            raise FlagError(f"{_shown(value)} is not a value of {spelling.option} {spelling.kind}")
        if isinstance(value, list):
            if spelling.action.nargs is None:
                raise FlagError(f"{spelling.option} takes one value, not a list of {len(value)}")
            flags = [spelling.option, *map(_text, value)]
        else:
            text = _text(value)
            # argparse would take a value that begins with a dash for the next flag.
            is_plain = not text.startswith("-")
            flags = [spelling.option, text] if is_plain else [f"{spelling.option}={text}"]
        try:
            self._parser.parse_args(flags)
        except RefusedError as refused:
            raise FlagError(f"{refused} ({spelling.option})") from None
        except (ValueError, TypeError, AssertionError) as error:  # Megatron's own types
            raise FlagError(
                f"{_shown(value)} is not a value of {spelling.option}: {error}"
            ) from None
        return flags

    def _switched(self, spelling: Spelling, value: Any) -> list[str]:
        if not isinstance(value, bool):
            raise FlagError(f"{_shown(value)}; {spelling.option} is a switch: true or false")
        action, wanted = spelling.action, value != spelling.is_negated
        if isinstance(action, argparse.BooleanOptionalAction):
            return [spelling.option if value else f"--no-{spelling.option.removeprefix('--')}"]
        if wanted:
            return [spelling.option]
        for other in self._parser._actions:
            if other is not action and other.dest == action.dest and isinstance(other, _BOOLEAN):
                return [other.option_strings[0]]
        if getattr(self._preset, action.dest) == action.const:
            raise FlagError(
                f"{spelling.option} is set for this model or by megasft, and Megatron has no flag "
                "that takes it back; drop the key"
            )
        return []

    def options(self, spelling: Spelling) -> list[str]:
        """Return all flags that set what a flag sets."""
        actions = self._parser._actions
        return [o for a in actions if a.dest == spelling.action.dest for o in a.option_strings]

    def nearest_section(self, section: str) -> str:
        """Return what an unknown section was probably meant to be, for an error's end."""
        close = difflib.get_close_matches(section, SECTIONS, n=1)
        return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(SECTIONS)}"

    def listing(self, part: str) -> Iterator[tuple[str, str, str]]:
        """Yield key, kind and help of every key that holds ``part``, those with a section first."""
        part = part.replace("-", "_").lower()
        for (section, key), text in OWN_KEYS.items():
            yield from _if_in(part, f"{section}.{key}", "", text)
        for (section, key), text in launch_keys().items():
            yield from _if_in(part, f"{section}.{key}", "", text)
        for (section, key), flag in SHORT_NAMES.items():
            spelling = self._spellings[_key(flag)]
            yield from _if_in(part, f"{section}.{key}", spelling.kind, spelling.action.help or "")
        for key, spelling in sorted(self._spellings.items()):
            text = spelling.action.help or ""
            if spelling.is_negated:
                text = f"false: {spelling.option}. {text}"
            yield from _if_in(part, key, spelling.kind, text)


@cache
def _whole_parser() -> _Parser:
    """Return the parser of all flags; nobody adds to it, and Megatron takes 0.1 s to make it."""
    from megasft.training.arguments import add_arguments

    parser = _Parser(allow_abbrev=False, add_help=False)
    add_flags(parser)
    add_arguments(parser)
    return parser


def launch_keys() -> dict[tuple[str, str], str]:
    """Return the keys of the section launch, with their help."""
    from megasft.launch.settings import LAUNCH_HELP

    return {(LAUNCH, key): text for key, text in LAUNCH_HELP.items()}


def _if_in(part: str, key: str, kind: str, text: str) -> Iterator[tuple[str, str, str]]:
    if part in key:
        yield key, kind, " ".join(text.split())


def here(other: str) -> str:
    """Say which key it is here that another tool has under its name.

    Example:
        >>> here("output_dir")
        'here it is checkpoint.save'
    """
    flag = OTHER_NAMES[other]
    named = {spelled: place for place, spelled in SHORT_NAMES.items()} | {_HF_FLAG: ("model", "hf")}
    key = _key(flag).removeprefix("megasft_")
    return other_name(other, ".".join(named.get(flag, (_USUAL_SECTIONS.get(key, "optim"), key))))


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        raise FlagError(f"{_shown(value)} inside a list is not a value of a flag")
    return str(value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
