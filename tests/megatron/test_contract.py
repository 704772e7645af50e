"""The installed Megatron is the one that megasft was written against, name by name.

Existence and signature of everything product code imports of Megatron and of all that
``megasft/megatron/symbols.py`` lists, and the text of what is mirrored. After a change of
Megatron: look at what each failing test names, adapt the code, then write ``contract.json`` again
with ``MEGASFT_WRITE_DOCS=1 python -m pytest tests/megatron/test_contract.py``.
"""

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megasft.megatron.symbols import MIRRORED, REPLACED, USED

ROOT = Path(__file__).parents[2]
CONTRACT = Path(__file__).with_name("contract.json")
TREES = (ROOT / "megasft", ROOT / "checkpoint_convert")
LISTED = (*USED, *REPLACED, *MIRRORED)
OPTIONAL = "megatron.bridge"  # another package, installed by users of that engine
pytestmark = pytest.mark.slow  # imports Megatron


def imported() -> Iterator[str]:
    """Yield ``module:name`` of every import of Megatron in product code, hidden ones included."""
    for tree in TREES:
        for path in tree.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                    yield from (f"{node.module}:{alias.name}" for alias in node.names)
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                    yield from (f"{n}:" for n in names if n.startswith("megatron"))


@cache
def paths() -> list[str]:
    """Return everything that is used of Megatron."""
    names = {path for path in imported() if not path.startswith(OPTIONAL)}
    return sorted(names | {symbol.path for symbol in LISTED})


def resolve(path: str) -> Any:
    """Return the object of a path; for an attribute that only instances have, its class."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        if not hasattr(found, part):
            if inspect.ismodule(found):  # a module of its own, or nothing: ImportError
                return importlib.import_module(f"{found.__name__}.{part}")
            assert inspect.isclass(found), f"{path}: {found} has no {part}"
            assert is_set_by(found, part), f"{path}: there is no {part} in {found}"
            return found
        found = getattr(found, part)
    return found


def is_set_by(owner: type, name: str) -> bool:
    """Say whether a class has a field, or sets an attribute on itself, of this name."""
    if dataclasses.is_dataclass(owner):
        return name in {field.name for field in dataclasses.fields(owner)}
    pattern = re.compile(rf"self\.{name}\b.*=|register_buffer\(\s*['\"]{name}")
    return any(pattern.search(inspect.getsource(base)) for base in owner.__mro__[:-1])


def signature_of(found: Any) -> str:
    """Return how a callable is called; an empty text for what is none."""
    if not callable(found):
        return ""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return ""
    # Defaults and annotations print addresses, and change without a change for the caller.
    return ", ".join(f"{p.kind.name.lower()} {p.name}" for p in parameters)


def text_of(found: Any) -> str:
    """Return a hash of the code of a function, without comments and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def written(path: str) -> dict[str, str]:
    found = resolve(path)
    entry = {"signature": signature_of(found)}
    if path in {symbol.path for symbol in MIRRORED}:
        entry["text"] = text_of(found)
    return entry


def test_what_is_used_of_megatron_is_as_it_was() -> None:
    now = {path: written(path) for path in paths()}
    if os.environ.get("MEGASFT_WRITE_DOCS"):
        CONTRACT.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    contract = json.loads(CONTRACT.read_text())
    reasons = {symbol.path: symbol.reason for symbol in LISTED}
    changed = [
        f"{path} ({reasons.get(path, 'imported')}): {contract.get(path)} -> {now.get(path)}"
        for path in sorted(now.keys() | contract.keys())
        if now.get(path) != contract.get(path)
    ]
    assert not changed, "\n".join(changed)


def test_each_symbol_is_listed_once_with_its_reason() -> None:
    listed = [symbol.path for symbol in LISTED]
    assert len(set(listed)) == len(listed)
    assert all(symbol.reason for symbol in LISTED)


def test_each_private_name_has_its_reason() -> None:
    private = {p for p in paths() if any(x.startswith("_") for x in re.split("[:.]", p))}
    assert len(private) >= 3
    assert not private - {symbol.path for symbol in LISTED}


@pytest.mark.parametrize("name", ["GPTModel.no_such_thing", "NoSuchModel", "GPTModel.forward.x"])
def test_a_name_that_is_gone_is_noticed(name: str) -> None:
    with pytest.raises((AssertionError, ImportError)):
        resolve(f"megatron.core.models.gpt.gpt_model:{name}")


def test_a_changed_parameter_and_a_changed_line_are_noticed() -> None:
    def before(a: int) -> int:
        return a + 1

    def after(a: int) -> int:
        return a + 2

    def renamed(b: int) -> int:
        return b + 1

    assert signature_of(before) == signature_of(after) != signature_of(renamed)
    assert text_of(before) != text_of(after)
