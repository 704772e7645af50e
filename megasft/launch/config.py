"""Reads a run.yaml and the overrides of the command line into settings that know their line.

OmegaConf reads, interpolates and merges; PyYAML's node tree says which line a key is on, which
OmegaConf forgets, because an error without its line costs a search through a long file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megasft.errors import FlagError
from megasft.launch import written
from megasft.launch.catalog import here
from megasft.launch.written import OVERRIDE, Setting
from megasft.training.unknown_flags import OTHER_NAMES

_CLOCK_TIME: Final = re.compile(r"[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def read(path: Path, overrides: Sequence[str]) -> list[Setting]:
    """Read a file, put the overrides over it, and resolve interpolations.

    Args:
        path: YAML of two levels, section and key.
        overrides: ``section.key=value``, the value in YAML; null takes a key back.

    Raises:
        FlagError: The file cannot be read, is no such YAML, or an interpolation leads nowhere.
    """
    text = _text(path)
    try:
        _refuse_clock_times(text, path)
        lines = _lines(text)
        tree = OmegaConf.create(_with_underscores(_sections(text, path), path, lines))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise FlagError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from error
    places = {name: f"{path}:{line}" for name, line in lines.items()}
    changes = [_override(text) for text in overrides]
    for number, change in enumerate(changes):
        if any(other.name == change.name for other in changes[:number]):
            raise FlagError(f"{change.name} is given by two overrides; drop one of them")
        places[change.section, change.key] = place = f"{OVERRIDE}{change.shown}"
        tree = _merged(tree, change, place)
    try:
        raw: Any = OmegaConf.to_container(tree, resolve=False)
        resolved: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        section, _, key = str(error.full_key or "").partition(".")
        where = places.get((section, key.partition(".")[0]), str(path))
        raise FlagError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from error
    kept = written.written(raw, resolved)
    return [
        Setting(section, key, value, kept[section][key], places.get((section, key), str(path)))
        for section, content in resolved.items()
        for key, value in (content or {}).items()
        if value is not None
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise FlagError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FlagError(f"{path} is not UTF-8 text: {error.reason}") from error


def _sections(text: str, path: Path) -> dict[Any, Any]:
    content = OmegaConf.create(text)
    plain = OmegaConf.to_container(content, resolve=False)
    if not isinstance(plain, dict):
        raise FlagError(f"{path} is a list; a run has sections with keys, as `data: {{store: S}}`")
    return plain


def _with_underscores(
    content: dict[Any, Any], path: Path, lines: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """Write the names of two levels with underscores, so that an override meets its key."""
    sections: dict[str, Any] = {}
    for section, keys in content.items():
        if keys is not None and not isinstance(keys, dict):
            key = _underscored(str(section))
            hint = here(key) if key in OTHER_NAMES else "put the key in one, as optim: {lr: 1e-5}"
            line = lines.get((key, ""), 1)
            raise FlagError(f"{path}:{line}: {section} is not a section with keys; {hint}")
        for key in keys or {}:
            if not isinstance(key, str):
                raise FlagError(f"{path}: YAML takes the key {section}.{key} for no text; quote it")
        new = sections.setdefault(_underscored(str(section)), {})
        for key, value in (keys or {}).items():
            if (name := _underscored(key)) in new:
                raise FlagError(f"{path}: {section}.{name} is set twice, with dashes and without")
            new[name] = value
    return sections


def _lines(text: str) -> dict[tuple[str, str], int]:
    """Return the line of each section, under the key "", and of each of its keys, from 1."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines: dict[tuple[str, str], int] = {}
    for section, keys in root.value if isinstance(root, yaml.MappingNode) else ():
        name = _underscored(section.value)
        lines[name, ""] = section.start_mark.line + 1
        for key, _ in keys.value if isinstance(keys, yaml.MappingNode) else ():
            lines[name, _underscored(key.value)] = key.start_mark.line + 1
    return lines


class _Change(NamedTuple):
    section: str
    key: str
    name: str
    value: str
    shown: str


def _refuse_clock_times(text: str, path: Path) -> None:
    """YAML 1.1 counts 24:00:00 in seconds; sbatch would take those for minutes."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        if is_plain and _CLOCK_TIME.fullmatch(event.value):
            raise FlagError(
                f"{path}:{event.start_mark.line + 1}: YAML takes {event.value} for a number of "
                "seconds; quote it"
            )


def _override(text: str) -> _Change:
    """Split ``section.key[.more]=value``."""
    name, equals, value = text.partition("=")
    section, *rest = name.split(".")
    if not equals or not rest or not all(name.split(".")):
        shown = written.override(text)
        raise FlagError(f"override {shown}: it is written section.key=value, as optim.lr=1e-5")
    section, key = _underscored(section), _underscored(rest[0])
    if _CLOCK_TIME.fullmatch(value):
        value = f"'{value}'"
    name = ".".join([section, key, *rest[1:]])
    return _Change(section, key, name, value, written.override(text))


def _merged(tree: Any, change: _Change, place: str) -> Any:
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{change.name}={change.value}"]))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        # The reason may quote the value, which a secret's place does not.
        reason = str(error).splitlines()[0] if change.value in place else "it cannot be set so"
        raise FlagError(f"{place}: {reason}") from None


def _underscored(name: str) -> str:
    return name.replace("-", "_")
