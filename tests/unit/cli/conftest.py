"""Runs `megasft` in this process and returns what a user sees."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from megasft.cli.main import main
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.checks.run.conftest import World


class Seen(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def megasft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Seen]:
    def run(*arguments: object) -> Seen:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        code = caught.value.code
        assert isinstance(code, int)
        return Seen(code, *capsys.readouterr())

    return run
