"""The places records can be written to, by name."""

from collections.abc import Callable
from typing import Final

from megasft.report.console import Console
from megasft.report.jsonl import Jsonl
from megasft.report.mlflow import MLflow
from megasft.report.sink import Setup, Sink
from megasft.report.swanlab import SwanLab
from megasft.report.tensorboard import TensorBoard
from megasft.report.wandb import Wandb

SINKS: Final[dict[str, Callable[[Setup], Sink]]] = {
    "console": Console,
    "jsonl": Jsonl,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
    "mlflow": MLflow,
}
"""Makers of sinks. A tracker's package is imported when its sink is made, and not before."""

TRACKERS: Final = ("wandb", "swanlab", "mlflow")
"""Those a user asks for by ``--megasft-track``."""
