"""One aligned line per step on the screen, and now and then a table of categories.

Megatron prints lines of its own, every ``--log-interval`` steps (100 unless told otherwise). They
stay: they hold what only Megatron knows (loss scale, skipped iterations, timers). Ours starts with
``[megasft]`` as all our lines do, so either can be left out by a grep.
"""

from rich.console import Console as Screen
from rich.table import Table
from rich.text import Text

from megasft.report.record import Losses, Means, Record, StepRecord, perplexity
from megasft.report.sink import Setup

_WIDTH = 100


class Console:
    """Prints to stdout."""

    def __init__(self, setup: Setup, screen: Screen | None = None) -> None:
        self.interval, self.table_interval = setup.console_interval, setup.table_interval
        # Without a terminal a line stays one line, and a table keeps its width.
        self.screen = screen or Screen(highlight=False, soft_wrap=True)

    def write(self, record: Record) -> None:
        """Print a step, or a line for each validation set; and a table when it is due."""
        if isinstance(record, StepRecord):
            if self.interval and record.step % self.interval == 0:
                self._print(line_of(record))
            is_due = self.table_interval and record.step % self.table_interval == 0
            if record.losses is not None and is_due:
                self._print_table(record.losses, title=f"step {record.step}")
            return
        for name, losses in record.sets.items():
            title = f"validation {name} after step {record.step}"
            if losses is not None and self.interval:
                self._print(
                    f"{title}  {_means_of(losses)}  perplexity {perplexity(losses.token_loss):.3f}"
                )
            if losses is not None and self.table_interval and losses.categories:
                self._print_table(losses, title=title)

    def close(self) -> None:
        """Leave the screen as it is."""

    def _print_table(self, losses: Losses, *, title: str) -> None:
        self.screen.print(table_of(losses, title=title), width=_WIDTH)

    def _print(self, text: str) -> None:
        # Text, because rich would take "[megasft]" for a style.
        self.screen.print(Text(f"[megasft] {text}"))


def line_of(record: StepRecord) -> str:
    """Return the line of a step; columns keep their places from step to step."""
    total, speed = str(record.num_steps), record.speed
    labels, turns, samples, losses = 0, 0, 0, "no label in this step"
    if record.losses is not None:
        labels, turns, samples = record.losses.labels, record.losses.turns, record.losses.samples
        losses = _means_of(record.losses)
    norm = "     -" if record.grad_norm is None else f"{record.grad_norm:6.3f}"
    rate = "       -" if record.learning_rate is None else f"{record.learning_rate:.2e}"
    mfu = "" if speed.mfu is None else f" {100 * speed.mfu:4.1f}% MFU"
    parts = (
        f"step {record.step:{len(total)}d}/{total}  {losses}",
        f"norm {norm} lr {rate}",
        f"{turns:6,d} turns {samples:6,d} samples {labels:9,d} labels",
        f"{100 * record.padding:4.1f}% pad",
        f"{speed.tokens:7,.0f} tok/s {speed.labels:7,.0f} lab/s {speed.tflops:7.4g} TFLOP/s{mfu}",
        f"{speed.seconds:6.2f} s {record.memory_gib:5.1f} GiB",
    )
    skipped = " | skipped: the gradient is not finite" if record.is_skipped else ""
    return " | ".join(parts) + skipped


def table_of(losses: Losses, *, title: str) -> Table:
    """Return the table of categories, turn positions and turn lengths; dearest category first."""
    table = Table("", "loss", "turn mean", "p correct", "labels", "turns", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    by_loss = sorted(losses.categories.items(), key=lambda item: -item[1].loss)
    for name, means in by_loss:
        table.add_row(Text(name), *_cells(means))
    for what, group in (("turn", losses.turn_positions), ("labels", losses.turn_lengths)):
        table.add_section()
        for name, means in group.items():
            table.add_row(f"{what} {name}", *_cells(means))
    return table


def _means_of(losses: Losses) -> str:
    return (
        f"loss {losses.loss:6.4f}  token {losses.token_loss:6.4f} sample {losses.sample_loss:6.4f} "
        f"turn {losses.turn_loss:6.4f} p {losses.p_correct:.3f}"
    )


def _cells(means: Means) -> tuple[str, ...]:
    losses = (f"{means.loss:.4f}", f"{means.turn_loss:.4f}", f"{means.p_correct:.3f}")
    return (*losses, f"{means.labels:,}", f"{means.turns:,}")
