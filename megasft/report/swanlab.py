"""Records to SwanLab, whose own variables say where: SWANLAB_PROJ_NAME, SWANLAB_MODE, ..."""

from megasft.report.record import Record, scalars
from megasft.report.sink import Setup


class SwanLab:
    """An experiment of SwanLab."""

    def __init__(self, setup: Setup) -> None:
        import swanlab

        folder = None if setup.folder is None else str(setup.folder / "swanlab")
        self.run = swanlab.init(config=dict(setup.flags), logdir=folder)

    def write(self, record: Record) -> None:
        """Log a step or an evaluation."""
        self.run.log(scalars(record), step=record.step)

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()
