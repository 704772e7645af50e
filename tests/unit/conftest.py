"""Fixtures of unit tests."""

import pytest

from megasft.cli import build


@pytest.fixture(autouse=True)
def builds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `megasft build` without --workers make samples in this process, if inputs are small.

    A worker takes 2 s of CPU to start. ``monkeypatch.undo()`` gives a test what a user gets.
    """
    fitting = build._fitting_workers
    monkeypatch.setattr(build, "_fitting_workers", lambda files: fitting(files) - 1)
