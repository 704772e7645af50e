"""Compares what a run recorded with the float64 truth, tensor by tensor."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from checkpoint_convert.config_map import Model
from checkpoint_convert.tensor_map import to_hf
from megasft.proof.oracle import Tensors, Truth

LOSS_TOLERANCE: Final = 1e-6
GRADIENT_TOLERANCE: Final = 2e-5
PARAMETER_TOLERANCE: Final = 1e-5
"""Relative errors allowed in float32. Losses and parameters end within a few units in the last
place (6e-8 each); a gradient passes through four layers, in another order on every layout. Most
seen on 270 runs: 1.2e-7, 6.8e-6, 1.0e-6; other processors round otherwise, and the known defects
are off by 1e-3 or more."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One layout and objective against the truth.

    Attributes:
        loss_error: |loss - truth| / truth.
        gradient_error: Largest ‖g - truth‖ / ‖truth‖ of any tensor.
        worst_gradient: That tensor's name.
        parameter_error: The same for parameters after the optimizer step.
        update_error: ‖Δ - truth‖ / ‖truth‖ of that step's updates, all tensors together.
        threads: Of the first rank's process at the end of the run.
        failure: Why there is no record, when there is none.
    """

    family: str
    layout: str
    ranks: int
    objective: str
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    worst_gradient: str = ""
    parameter_error: float = float("nan")
    update_error: float = float("nan")
    threads: int = 0
    failure: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether every error is within its tolerance; nan is not."""
        return (
            not self.failure
            and self.loss_error <= LOSS_TOLERANCE
            and self.gradient_error <= GRADIENT_TOLERANCE
            and self.parameter_error <= PARAMETER_TOLERANCE
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the verdict, for JSON."""
        return asdict(self) | {"is_exact": self.is_exact}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ‖found - wanted‖ / ‖wanted‖ in float64; of a zero tensor, ‖found‖.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0]))
        0.02
    """
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / (size or 1.0)


def worst(found: Tensors, wanted: Tensors) -> tuple[float, str]:
    """Return the largest relative error and whose it is; nan is larger than anything.

    Raises:
        KeyError: A tensor is missing.
    """
    errors = {name: relative_error(found[name], tensor) for name, tensor in wanted.items()}
    name = max(errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n])
    return errors[name], name


def compare(record: Path, truth: Truth, model: Model, start: Tensors) -> dict[str, Any]:
    """Return the errors of a recorded run, as fields of a ``Verdict``.

    Args:
        record: What ``worker.Recorder`` wrote.
        truth: What it should be.
        model: How Megatron's names become Hugging Face's.
        start: The parameters before the step, by Hugging Face's names.
    """
    run = torch.load(record, weights_only=True)
    # Buffers (an expert's bias) have no gradient; conversion asks for every tensor of a model.
    shape = (model.num_layers, model.num_experts)
    buffers = {rule.megatron: torch.zeros(shape) for rule in model.rules if rule.is_buffer}
    gradients, parameters = (
        to_hf(buffers | run[kind], model, verify=False) for kind in ("gradients", "parameters")
    )
    gradient_error, worst_gradient = worst(gradients, truth.gradients)
    updates = [
        torch.cat([(values[n].double() - start[n].double()).flatten() for n in truth.parameters])
        for values in (parameters, truth.parameters)
    ]
    return {
        "loss_error": abs(run["loss"] - truth.loss) / (abs(truth.loss) or 1.0),
        "gradient_error": gradient_error,
        "worst_gradient": worst_gradient,
        "parameter_error": worst(parameters, truth.parameters)[0],
        "update_error": relative_error(updates[0], updates[1]),
        "threads": run["threads"],
    }
