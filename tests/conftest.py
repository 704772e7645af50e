"""Fixtures for tests of any kind."""

import logging
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# A deadline and a limit for drawing are timed assertions: a busy machine breaks them.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
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


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Hear SIGHUP and SIGINT, which are ignored under nohup and in the background of a script."""
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ignored = [number for number in heard if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, heard[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: workers that share out files should end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
