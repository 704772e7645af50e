from types import SimpleNamespace
from typing import Any

from megasft.megatron import cpu
from megasft.megatron.optimizer_watch import OptimizerStep, watch


class Optimizer:
    """What Megatron's optimizers offer of what is used."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 1e9}, {"lr": 0.5, "default_config": True}]
        self.results: list[Any] = [(True, 2.5, 0), (False, None, None)]

    def scale_loss(self, loss: Any) -> Any:
        return loss

    def step(self) -> Any:
        return self.results.pop(0)


def test_each_step_is_told_with_its_norm_and_the_rate_it_was_made_with() -> None:
    cpu.prepare()
    optimizer, told = Optimizer(), list[OptimizerStep]()
    assert watch(SimpleNamespace(grad_scale_func=optimizer.scale_loss), told.append)

    assert optimizer.step() == (True, 2.5, 0), "what it returns is what Megatron gets"
    optimizer.param_groups[1]["lr"] = 0.25
    assert optimizer.step() == (False, None, None)
    assert told == [
        OptimizerStep(is_skipped=False, grad_norm=2.5, learning_rate=0.5),
        OptimizerStep(is_skipped=True, grad_norm=None, learning_rate=0.25),
    ]
    assert Optimizer.step is not optimizer.step, "one object is watched, not a class"


def test_without_an_optimizer_there_is_nothing_to_watch() -> None:
    cpu.prepare()
    assert not watch(SimpleNamespace(grad_scale_func=None), lambda _: None)
