"""What of a run may be written down: environment variables and secrets by name, never by value.

A run.yaml refers to the environment by ``${oc.env:NAME}``, and files that are kept, commands that
are printed and errors say it the same way; everything else is resolved. A secret of ``launch.env``,
known by its name, that is given as it is becomes ``${oc.env:ITS_NAME}``: it has to be exported
before the kept file is started. In a shell, ``${oc.env:NAME}`` is ``${NAME:?...}``.

A command is made of resolved values, and its words may be derived from them (a log folder from
``checkpoint.save``). So the value of a variable is looked for in each word, where no letter or
digit is next to it; a number, or one shorter than ``LEAST_LENGTH``, hides nothing and is left.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import yaml

OVERRIDE: Final = "override "
"""Begins the place of what the command line set."""
ENV: Final = ("launch", "env")
LEAST_LENGTH: Final = 3
WITHHELD: Final = "..."
_SECRET: Final = re.compile("KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_REFERENCE: Final = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)+)\}")
_VARIABLE: Final = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}$]*))?\}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A key with its value, and where it stands.

    Attributes:
        key: With underscores.
        value: Resolved.
        written: As it may be kept and printed; see ``written``.
        place: ``run.yaml:12``, or the override.
    """

    section: str
    key: str
    value: Any
    written: Any
    place: str

    @property
    def name(self) -> str:
        """Section and key, as an override has them."""
        return f"{self.section}.{self.key}"

    @property
    def source(self) -> str:
        """Place and name; an override has both."""
        return self.place if self.place.startswith(OVERRIDE) else f"{self.place} {self.name}"


def is_secret(name: str) -> bool:
    """Say whether the value of a variable of this name is to be kept secret.

    Example:
        >>> [is_secret(n) for n in ("WANDB_API_KEY", "HF_TOKEN", "TOKENIZERS_PARALLELISM")]
        [True, True, False]
    """
    return _SECRET.search(name) is not None


def written(raw: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree as it may be kept: resolved, but for what comes from the environment.

    Args:
        raw: Sections with keys, interpolations as they were given.
        resolved: The same without interpolations.
    """
    return {
        section: {
            key: _written(raw[section][key], value, raw, (section, key))
            for key, value in (keys or {}).items()
        }
        for section, keys in resolved.items()
    }


def _written(raw: Any, resolved: Any, tree: Mapping[str, Any], path: tuple[Any, ...]) -> Any:
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {k: _written(raw[k], v, tree, (*path, k)) for k, v in resolved.items()}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [_written(r, v, tree, path) for r, v in zip(raw, resolved, strict=True)]
    text = _expanded(raw, tree) if isinstance(raw, str) else ""
    if path[:2] == ENV and is_secret(str(path[-1])):
        return _without_value(str(path[-1]), text)
    # What is more than references and variables can be said only in the words it was given in.
    if not _is_understood(text):
        return raw
    return text if _VARIABLE.search(text) else resolved


def _is_understood(text: str) -> bool:
    return "${" not in _VARIABLE.sub("", text)


def _without_value(name: str, text: str) -> str:
    """Return how a secret is written: by variables, without a default, which might be its value."""
    if _VARIABLE.search(text) and _is_understood(text):
        return _VARIABLE.sub(r"${oc.env:\1}", text)
    return f"${{oc.env:{name}}}"


def _expanded(text: str, tree: Mapping[str, Any]) -> str:
    """Put in the place of references what they refer to, as it was given."""

    def referred(found: re.Match[str]) -> str:
        node: Any = tree
        for part in found[1].split("."):
            if not isinstance(node, Mapping) or part not in node:
                return found[0]
            node = node[part]
        if isinstance(node, (Mapping, list)):
            return found[0]
        return _expanded(node, tree) if isinstance(node, str) else str(node)

    return _REFERENCE.sub(referred, text)


def override(text: str) -> str:
    """Return an override as it may be shown.

    Example:
        >>> override("launch.env.WANDB_API_KEY=abc")
        'launch.env.WANDB_API_KEY=${oc.env:WANDB_API_KEY}'
        >>> override("launch.env={HF_TOKEN: abc, A: 1}")
        "launch.env={HF_TOKEN: '${oc.env:HF_TOKEN}', A: 1}"
    """
    name, equals, value = text.partition("=")
    section, _, rest = name.partition(".")
    last = name.rpartition(".")[2]
    if not equals:
        return text
    if rest and is_secret(last) and (section == ENV[0] or last.isupper()):
        return f"{name}={_without_value(last, value)}"
    # A mapping may hold secrets under names of its own.
    if section != ENV[0] or "{" not in value or not _SECRET.search(value):
        return text
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        content = None
    if rest != ENV[1] or not isinstance(content, dict):
        return f"{name}={WITHHELD}"
    shown = environment(content)
    dumped: str = yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{name}={dumped.strip()}"


def environment(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping of ``launch.env`` as it may be shown."""
    return {
        str(key): _without_value(str(key), str(value)) if is_secret(str(key)) else value
        for key, value in content.items()
    }


@dataclass(frozen=True, slots=True)
class Hidden:
    """Values that are not to be seen, and what stands for them.

    Attributes:
        variables: By value, the longest first; in words of a command.
        secrets: By value; in messages, where a folder is still named in full.
        environment: Of ``launch.env``, what is written for each name that hides something.
        needed: Variables that what is written refers to.
    """

    variables: dict[str, str]
    secrets: dict[str, str]
    environment: dict[str, str]
    needed: tuple[str, ...]

    @classmethod
    def of(cls, settings: Iterable[Setting], environ: Mapping[str, str]) -> Self:
        """Find what the settings of a run hide.

        Args:
            settings: Resolved.
            environ: That they were resolved with.
        """
        settings = list(settings)
        environment: dict[str, str] = {}
        secrets: dict[str, str] = {}
        for setting in settings:
            if (setting.section, setting.key) == ENV:
                for name, value, text in _leaves(setting.value, setting.written, ENV[1]):
                    environment[name] = secrets[str(value)] = _in_shell(name, text)
        mentions = list(_mentions(settings, environ))
        found = [each for each in mentions if each.value is not None]
        variables = {str(each.value): each.variable for each in found if each.is_told_by_value}
        secrets |= {str(e.value): f"${{oc.env:{e.variable}}}" for e in found if e.is_secret}
        needed = [e.variable for e in mentions if e.value is not None or not e.has_default]
        return cls(
            _longest_first(variables),
            _longest_first(secrets),
            environment,
            tuple(dict.fromkeys(needed)),
        )

    def word(self, text: str) -> str:
        """Quote a word of a command, with variables of the shell for values."""
        if not self.is_in(text):
            return shlex.quote(text)
        parts: list[str | None] = []
        start = 0
        # The name of a flag is no value.
        begin = text.find("=") + 1 if text.startswith("--") else 0
        for found in _any_of(self.variables).finditer(text, begin):
            parts += [text[start : found.start()], None, self.variables[found[0]]]
            start = found.end()
        return _joined([*parts, text[start:]])

    def is_in(self, text: str) -> bool:
        """Say whether a word holds a value that is not to be seen."""
        if text.startswith("--") and "=" not in text:
            return False
        return bool(self.variables) and _any_of(self.variables).search(text) is not None

    def assignment(self, name: str, value: str) -> str:
        """Return a variable of ``launch.env`` as a word of a shell."""
        text = self.environment.get(name)
        return f"{name}={self.word(value) if text is None else shell_word(text)}"

    def message(self, text: str) -> str:
        """Return a message without secrets."""
        if not self.secrets:
            return text
        return _any_of(self.secrets).sub(lambda found: self.secrets[found[0]], text)


class _Mention(NamedTuple):
    """A variable in what is written of a value.

    Attributes:
        value: None when the variable is not set.
        has_default: Whether the run.yaml has one for that case.
        is_secret: Whether its value is not to be shown in messages.
        is_told_by_value: Whether its value is looked for in the words of a command.
    """

    variable: str
    value: str | None
    has_default: bool
    is_secret: bool
    is_told_by_value: bool


def _mentions(settings: Iterable[Setting], environ: Mapping[str, str]) -> Iterator[_Mention]:
    for setting in settings:
        is_env = (setting.section, setting.key) == ENV
        for name, value, kept in _leaves(setting.value, setting.written, setting.key):
            text = _in_shell(name, kept) if is_env else kept
            for variable, default in _VARIABLE.findall(text):
                is_whole = text == f"${{oc.env:{variable}}}"
                found = str(value) if is_whole else environ.get(variable)
                is_named = is_secret(variable) or (is_env and is_secret(name))
                # Of a number one cannot say where it came from.
                is_told = is_named or not (is_env or found is None or _is_number(found))
                yield _Mention(variable, found, bool(default), is_named or is_env, is_told)


def _in_shell(name: str, text: str) -> str:
    """Return what is written of a part of ``launch.env`` in a form that a shell has, too."""
    return text if _is_understood(text) else f"${{oc.env:{name}}}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shell_word(text: str) -> str:
    r"""Return what is written of a value as a word of a shell.

    Example:
        >>> shell_word("${oc.env:WORK,/tmp}/a b")
        '"${WORK-/tmp}"\'/a b\''
    """
    parts: list[str | None] = []
    start = 0
    for found in _VARIABLE.finditer(text):
        parts += [text[start : found.start()], found[2], found[1]]
        start = found.end()
    return _joined([*parts, text[start:]])


def shell_line(line: str, text: str) -> str:
    """Return a line of shell code with its own variables in the place of the run.yaml's.

    Args:
        line: Resolved.
        text: What is written of it.
    """
    if not _is_understood(text):
        return line
    return _VARIABLE.sub(lambda found: _shell_variable(found[1], found[2]).strip('"'), text)


def _joined(parts: list[str | None]) -> str:
    """Join text, default and name of a variable, text, ... and quote them for a shell."""
    words = [shlex.quote(part) if (part := parts[0]) else ""]
    for default, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        assert name is not None
        words += [_shell_variable(name, default), shlex.quote(text) if text else ""]
    return "".join(words) or "''"


def _shell_variable(name: str, default: str | None) -> str:
    plain = "" if default is None else default.strip()
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "'\"":
        plain = plain[1:-1]
    if default is None or plain == "null":
        return f'"${{{name}:?export it first}}"'
    escaped = re.sub(r'([\\"$`}])', r"\\\1", plain)
    return f'"${{{name}-{escaped}}}"'


def _leaves(value: Any, text: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and what is written of each leaf where these two differ."""
    if isinstance(value, dict):
        for key, each in value.items():
            # A mapping that is referred to as a whole: its parts are known by their names alone.
            part = text.get(key) if isinstance(text, dict) else f"${{oc.env:{key}}}"
            yield from _leaves(each, part, str(key))
    elif isinstance(value, list) and isinstance(text, list):
        for each, part in zip(value, text, strict=True):
            yield from _leaves(each, part, name)
    elif isinstance(text, str) and text != value:
        yield name, value, text


def _longest_first(values: Mapping[str, str]) -> dict[str, str]:
    kept = [value for value in values if len(value) >= LEAST_LENGTH]
    return {value: values[value] for value in sorted(kept, key=len, reverse=True)}


def _any_of(values: Iterable[str]) -> re.Pattern[str]:
    either = "|".join(map(re.escape, values))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{either})(?![A-Za-z0-9])")
