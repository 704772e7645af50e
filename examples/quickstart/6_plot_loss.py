"""Plot the loss of one or more training runs from their TensorBoard files, as text and as PNG.

A resumed run writes a second event file; the files are merged by step, and where two of them hold
the same step the later file counts, because it is the run that went on.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRAIN: Final = "lm loss"
VALID: Final = "lm loss validation"
TAGS: Final = (TRAIN, VALID, "token loss", "turns")

CHART_ROWS: Final = 12
CHART_COLUMNS: Final = 60
LABEL_CHARS: Final = 8
EIGHTHS: Final = " ▁▂▃▄▅▆▇█"

Curve = dict[int, float]
"""Value at each step, ascending by step."""


class Mark(NamedTuple):
    """A step to draw a line at, and what happened there."""

    step: int
    text: str


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read the curves of ``TAGS`` that are present, merged over all event files of a folder."""
    curves: dict[str, Curve] = {}
    # The name holds the time of writing, so that the later file comes last and wins.
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.name):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: keep every step
        events.Reload()
        for tag in set(TAGS) & set(events.Tags()["scalars"]):
            points = {event.step: event.value for event in events.Scalars(tag)}
            curves[tag] = curves.get(tag, {}) | points
    return {tag: dict(sorted(curves[tag].items())) for tag in TAGS if tag in curves}


def column_means(curve: Curve, *, num_columns: int) -> list[float | None]:
    """Return the mean of each column when the steps are spread evenly over the columns."""
    first, last = min(curve), max(curve)
    columns: list[list[float]] = [[] for _ in range(num_columns)]
    for step, value in curve.items():
        columns[column_of(step, first=first, last=last, num_columns=num_columns)].append(value)
    return [sum(values) / len(values) if values else None for values in columns]


def column_of(step: int, *, first: int, last: int, num_columns: int) -> int:
    """Return the column of a step, in ``[0, num_columns)``."""
    return (step - first) * (num_columns - 1) // max(last - first, 1)


def text_chart(curve: Curve, marks: list[Mark]) -> Iterator[str]:
    """Yield the lines of a block chart: loss upwards from 0, steps to the right."""
    num_columns = min(CHART_COLUMNS, len(curve))
    means = column_means(curve, num_columns=num_columns)
    first, last = min(curve), max(curve)
    span = {"first": first, "last": last, "num_columns": num_columns}
    top = max(value for value in means if value is not None) or 1.0
    marked = {column_of(m.step, **span) for m in marks if first <= m.step <= last}
    yield f"{'loss':>{LABEL_CHARS}}"
    for row in reversed(range(CHART_ROWS)):
        cells = ""
        for column, mean in enumerate(means):
            eighths = round((mean or 0.0) / top * CHART_ROWS * 8) - row * 8
            block = EIGHTHS[min(max(eighths, 0), 8)]
            cells += "┊" if block == " " and column in marked else block
        label = f"{top * (row + 1) / CHART_ROWS:.2f}" if row % 3 == 2 else ""
        yield f"{label:>{LABEL_CHARS}} │{cells}"
    yield f"{'0.00':>{LABEL_CHARS}} └" + "─" * num_columns
    gap = " " * max(1, num_columns - len(f"{first}{last}"))
    yield f"{'step':>{LABEL_CHARS}}  {first}{gap}{last}"
    for mark in marks:
        yield f"{'':>{LABEL_CHARS}}  ┊ after step {mark.step}: {mark.text}"


def draw_png(curves: dict[str, Curve], marks: list[Mark], path: Path) -> None:
    """Draw the train and validation loss, with a line at each mark."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for tag, label, style in ((TRAIN, "train", "-"), (VALID, "validation", "o--")):
        if tag in curves:
            axes.plot(list(curves[tag]), list(curves[tag].values()), style, label=label)
    for mark in marks:
        axes.axvline(mark.step, color="grey", linestyle=":")
        axes.annotate(
            mark.text,
            xy=(mark.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            color="grey",
        )
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_mark(text: str) -> Mark:
    """Read ``STEP:TEXT``."""
    step, _, what = text.partition(":")
    return Mark(int(step), what)


def main() -> None:
    """Read the flags, draw both charts, print the first and the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensorboard", type=Path, required=True, help="folder of event files")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument(
        "--mark",
        type=parse_mark,
        action="append",
        default=[],
        metavar="STEP:TEXT",
        help="step after which something changed, and what; may be repeated",
    )
    args = parser.parse_args()
    curves = read_curves(args.tensorboard)
    if TRAIN not in curves:
        raise SystemExit(f"{args.tensorboard} holds no event file with the scalar '{TRAIN}'")
    print("\n".join(text_chart(curves[TRAIN], args.mark)))
    for tag in TAGS[1:]:
        if tag in curves:
            step, value = list(curves[tag].items())[-1]
            print(f"{tag} {value:.4f} at step {step}")
    draw_png(curves, args.mark, args.output)
    print(f"{args.output}: {len(curves[TRAIN])} steps")
    first, last = min(curves[TRAIN]), max(curves[TRAIN])
    ratio = curves[TRAIN][last] / curves[TRAIN][first]
    print(f"first loss {curves[TRAIN][first]:.4f} at step {first}")
    print(f"last loss {curves[TRAIN][last]:.4f} at step {last}, {ratio:.2f} of the first")


if __name__ == "__main__":
    main()
