"""Records as TensorBoard scalars, in the event file that Megatron writes its own to.

A file of our own beside it was rejected: TensorBoard follows one growing file in a folder, so that
one of the two would stop being drawn while the run goes on.
"""

from megasft import metrics
from megasft.report.record import StepRecord, ValidationRecord, scalars
from megasft.report.sink import Setup


class TensorBoard:
    """Adds scalars to Megatron's writer, which lives on the last rank."""

    def __init__(self, setup: Setup) -> None:
        assert setup.writer is not None, "a rank without a writer has no such sink"
        self.setup, self.writer = setup, setup.writer

    def step(self, record: StepRecord) -> None:
        """Add a step."""
        self._add(record)

    def validation(self, record: ValidationRecord) -> None:
        """Add an evaluation, and the losses of named sets by the tags Megatron would use, too."""
        self._add(record)
        for name in self.setup.valid_names:
            losses = record.sets[name]
            if losses is None:
                continue
            means = {metrics.LOSS: losses.loss, metrics.TOKEN_LOSS: losses.token_loss}
            if self.setup.flags.get("megasft_dft_alpha"):
                means[metrics.P_CORRECT] = losses.p_correct
            tags = {f"{metric} {name} validation": mean for metric, mean in means.items()}
            for tag, value in tags.items():
                self.writer.add_scalar(tag, value, record.step)
            if self.setup.wandb is not None:
                self.setup.wandb.log(tags, record.step)

    def close(self) -> None:
        """Write what is queued; the file is Megatron's to close."""
        self.writer.flush()

    def _add(self, record: StepRecord | ValidationRecord) -> None:
        for tag, value in scalars(record).items():
            self.writer.add_scalar(tag, value, record.step)
