"""Curves of several runs as one picture: a panel for each quantity, a colour for each run.

Small panels of one quantity each were chosen over few panels of many lines: with three runs and
eight categories the latter has 24 lines in a panel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megasft.report.curves import Curve, RunCurves, smooth

PANELS: Final = {
    "loss": "loss (what is optimised)",
    "token_loss": "token mean",
    "sample_loss": "sample mean",
    "turn_loss": "turn mean",
    "avg_p_correct": "p of the right token",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s per rank",
}
"""Keys of a line, and what a panel calls them."""

NUM_COLUMNS: Final = 4
_MARKS: Final = "osD^v"
_PARTS: Final = 50
"""A smoothed value is the mean over this part of the run."""


def draw(runs: Sequence[RunCurves], path: Path, *, most_categories: int = 12) -> int:
    """Draw runs into a PNG.

    Args:
        runs: In the order of the legend.
        path: The file.
        most_categories: Panels of categories; those with the most labels come first.

    Returns:
        How many panels were drawn.
    """
    panels = [key for key in PANELS if any(key in run.train for run in runs)]
    categories = list(dict.fromkeys(name for run in runs for name in run.categories))
    categories = categories[:most_categories]
    num_rows = -(-(len(panels) + len(categories)) // NUM_COLUMNS)
    figure = Figure(figsize=(4.0 * NUM_COLUMNS, 2.6 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat
    colours = list(mpl.color_sequences["tab10"])
    sets = list(dict.fromkeys(name for run in runs for name in run.valid))
    marks = {name: _MARKS[n % len(_MARKS)] for n, name in enumerate(sets)}
    for n, run in enumerate(runs):
        colour = colours[n % len(colours)]
        for axis, key in zip(axes[: len(panels)], panels, strict=True):
            axis.set_title(PANELS[key], fontsize=10)
            _draw_curve(axis, run.train.get(key, {}), colour=colour)
            if key == "loss":
                for name, curve in run.valid.items():
                    style = {"marker": marks[name], "linestyle": ":", "markersize": 4}
                    axis.plot(list(curve), list(curve.values()), color=colour, **style)
        for axis, name in zip(axes[len(panels) :], categories, strict=False):
            axis.set_title(f"category {name}", fontsize=10)
            _draw_curve(axis, run.categories.get(name, {}), colour=colour)
    for axis in axes[len(panels) + len(categories) :]:
        axis.set_visible(False)
    _legend(figure, runs, colours, marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return len(panels) + len(categories)


def _draw_curve(axis: Any, curve: Curve, *, colour: Any) -> None:
    if not curve:
        return
    smoothed = smooth(curve, window=len(curve) // _PARTS + 1)
    steps, values = list(curve), list(curve.values())
    if len(curve) > _PARTS:
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, list(smoothed.values()), color=colour, linewidth=1.6)
    if len(curve) == 1:
        axis.plot(steps, values, "o", color=colour)
    axis.grid(visible=True, alpha=0.3)
    axis.tick_params(labelsize=8)


def _legend(
    figure: Figure, runs: Sequence[RunCurves], colours: Sequence[Any], marks: dict[str, str]
) -> None:
    handles = [
        Line2D([], [], color=colours[n % len(colours)], label=run.name)
        for n, run in enumerate(runs)
    ]
    for name, mark in marks.items():
        style: dict[str, Any] = {"marker": mark, "linestyle": ":", "color": "grey"}
        handles.append(Line2D([], [], label=f"validation {name}", **style))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
