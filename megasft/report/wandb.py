"""Records to Weights & Biases, whose own variables say where: WANDB_PROJECT, WANDB_NAME, ..."""

from megasft.report.record import Record, scalars
from megasft.report.sink import Setup


class Wandb:
    """A run of W&B. A resumed run goes on in it when WANDB_RUN_ID names it."""

    def __init__(self, setup: Setup) -> None:
        import wandb

        folder = None if setup.folder is None else str(setup.folder)
        self.run = wandb.init(config=dict(setup.flags), dir=folder, resume="allow")

    def write(self, record: Record) -> None:
        """Log a step, or an evaluation, which W&B adds to the step's own values."""
        self.run.log(scalars(record), step=record.step)

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()
