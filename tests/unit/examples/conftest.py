"""The quickstart's numbered scripts as modules, and the conversations that the first one makes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"

LoadScript = Callable[[str], ModuleType]


class Conversations(NamedTuple):
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    train_path: Path
    script: Path


@pytest.fixture(scope="session")
def load_script() -> LoadScript:
    def load(name: str) -> ModuleType:
        # A module's name cannot begin with a digit, so `import` does not find these.
        spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    folder = tmp_path_factory.mktemp("quickstart")
    train, valid = folder / "conversations.jsonl", folder / "valid.jsonl"
    script = QUICKSTART / "1_make_conversations.py"
    # A process of its own: importing the whole standard library is not for the tests' process.
    flags = ["--output", str(train), "--valid", str(valid)]
    subprocess.run([sys.executable, str(script), *flags], check=True, capture_output=True)
    records = [[json.loads(x) for x in path.open(encoding="utf-8")] for path in (train, valid)]
    return Conversations(*records, train_path=train, script=script)
