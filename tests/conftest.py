"""Fixtures for tests of any kind."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.ranks import Group

# A deadline is a timed assertion: a busy machine breaks it.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Threads of tiny models do nothing but wait for each other: the float64 truth of a training step
# takes 0.3 s of CPU with one and 4 s with two. Set here, as torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Take back where a test made megasft's own lines go: its standard error is closed by then."""
    logger = logging.getLogger("megasft")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the ranks that ``prove`` and ``verify`` start, which saves their imports.

    Asked for by tests of what the ranks compute. Others leave both to torchrun, as users have it:
    one test of ``tests/unit/cli/test_prove.py``, and the program of ``test_verify_logits.py``.
    """
    from checkpoint_convert.verify import workers
    from megasft.proof import prove

    def group(ranks: int, module: str, listing: Path, output: Any) -> Group:
        return Group(ranks, ("-m", module, str(listing)), stdout=output, stderr=output)

    def of_prove(ranks: int, listing: Path, settings: prove.Settings, output: Any) -> Group:
        assert settings.device == "cpu"
        return group(ranks, "megasft.proof.worker", listing, output)

    def of_verify(ranks: int, listing: Path, output: Any) -> Group:
        return group(ranks, workers.WORKER, listing, output)

    monkeypatch.setattr(prove, "_start", of_prove)
    monkeypatch.setattr(workers, "_start", of_verify)
