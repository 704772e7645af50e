"""Records to MLflow, whose own variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

import re
from typing import Final

from megasft.report.record import Record, scalars
from megasft.report.sink import Setup

_NOT_IN_NAMES: Final = re.compile(r"[^\w\-. /]")
"""What MLflow refuses in the name of a metric."""

_PARAM_CHARS: Final = 500
"""Length of a parameter that every MLflow server takes."""


class MLflow:
    """A run of MLflow. A resumed run goes on in it when MLFLOW_RUN_ID names it."""

    def __init__(self, setup: Setup) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run()
        mlflow.log_params({k: str(v)[:_PARAM_CHARS] for k, v in setup.flags.items()})

    def write(self, record: Record) -> None:
        """Log a step or an evaluation."""
        named = {_NOT_IN_NAMES.sub("_", tag): value for tag, value in scalars(record).items()}
        self.mlflow.log_metrics(named, step=record.step)

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()
