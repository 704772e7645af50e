"""Trackers are tested with modules that record calls: none of the three is installed here."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megasft.report.record import scalars
from megasft.report.sink import Setup, Sink
from megasft.report.sinks import SINKS, TRACKERS

from .records import STEP, VALIDATION

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Recorder(ModuleType):
    """A module whose every function is written down and returns the module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: Calls = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            return self

        return call


class Writer:
    """TensorBoard's writer as far as we use it."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], float] = {}
        self.flushed = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.found[tag, global_step] = scalar_value

    def flush(self) -> None:
        self.flushed += 1


@pytest.fixture(params=TRACKERS)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_no_tracker_is_imported_before_its_sink_is_made() -> None:
    assert not set(TRACKERS) & set(sys.modules)


def test_every_sink_takes_steps_and_validations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, Recorder(name))
    setup = Setup(folder=tmp_path, flags={"lr": 1e-5}, writer=Writer())
    for make in SINKS.values():
        sink: Sink = make(setup)
        sink.write(STEP)
        sink.write(VALIDATION)
        sink.close()
    assert set(TRACKERS) < set(SINKS)


def test_a_tracker_gets_the_flags_then_every_scalar_by_step(
    tracker: Recorder, tmp_path: Path
) -> None:
    sink = SINKS[tracker.__name__](Setup(folder=tmp_path, flags={"lr": 1e-5, "seed": 7}))
    before = len(tracker.calls)
    assert any("seed" in str(call) for call in tracker.calls)
    sink.write(STEP)
    sink.write(VALIDATION)
    sink.close()
    (name, (values,), where), (_, (evaluated,), _), (end, _, _) = tracker.calls[before:]
    assert name in ("log", "log_metrics") and where == {"step": 2}
    assert values == {tag: value for tag, value in scalars(STEP).items()}
    assert evaluated["eval/talk/loss"] == 1.25
    assert end in ("finish", "end_run")


def test_mlflow_gets_no_name_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    sink = SINKS["mlflow"](Setup(flags={"long": "x" * 9999}))
    (_, (params,), _) = next(call for call in module.calls if call[0] == "log_params")
    assert len(params["long"]) == 500
    from dataclasses import replace

    from .records import LOSSES

    odd = {"问答: a+b": LOSSES.categories["maths"]}
    sink.write(replace(STEP, losses=replace(LOSSES, categories=odd)))
    (_, (values,), _) = module.calls[-1]
    assert values["category/问答_ a_b"] == 1.0


def test_tensorboard_gets_every_scalar_and_is_flushed() -> None:
    writer = Writer()
    sink = SINKS["tensorboard"](Setup(writer=writer))
    sink.write(STEP)
    sink.close()
    assert writer.found == {(tag, 2): value for tag, value in scalars(STEP).items()}
    assert writer.flushed == 1


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_named_validation_sets_keep_the_tags_of_megatrons_own_line(alpha: float) -> None:
    writer, wandb = Writer(), Recorder("wandb")
    flags = {"megasft_dft_alpha": alpha}
    names = ("talk", "none")
    sink = SINKS["tensorboard"](Setup(flags=flags, writer=writer, wandb=wandb, valid_names=names))
    sink.write(VALIDATION)
    tags = {"lm loss talk validation": 1.25, "token loss talk validation": 1.5}
    if alpha:
        tags["p correct talk validation"] = 0.375
    known = {(tag, 2): value for tag, value in (scalars(VALIDATION) | tags).items()}
    assert writer.found == known, "a set without a label has no loss"
    assert wandb.calls == [("log", (tags, 2), {})]
