"""Records as TensorBoard scalars, in the event file that Megatron writes its own to.

A file of our own beside it was rejected: TensorBoard follows one growing file in a folder, so that
one of the two would stop being drawn while the run goes on.
"""

from megasft import metrics
from megasft.report.record import Record, ValidationRecord, scalars
from megasft.report.sink import Setup


class TensorBoard:
    """Adds scalars to Megatron's writer, which lives on the last rank."""

    def __init__(self, setup: Setup) -> None:
        assert setup.writer is not None, "a rank without a writer has no such sink"
        self.setup, self.writer = setup, setup.writer

    def write(self, record: Record) -> None:
        """Add a step, or an evaluation: the losses of named sets by tags as Megatron has, too."""
        tags = scalars(record)
        if isinstance(record, ValidationRecord):
            as_megatron = self._tags_as_megatron(record)
            tags |= as_megatron
            if self.setup.wandb is not None and as_megatron:
                self.setup.wandb.log(as_megatron, record.step)
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, record.step)

    def close(self) -> None:
        """Write what is queued; the file is Megatron's to close."""
        self.writer.flush()

    def _tags_as_megatron(self, record: ValidationRecord) -> dict[str, float]:
        tags = {}
        for name in self.setup.valid_names:
            losses = record.sets[name]
            if losses is not None:
                tags[f"{metrics.LOSS} {name} validation"] = losses.loss
                tags[f"{metrics.TOKEN_LOSS} {name} validation"] = losses.token_loss
                if self.setup.flags.get("megasft_dft_alpha"):
                    tags[f"{metrics.P_CORRECT} {name} validation"] = losses.p_correct
        return tags
