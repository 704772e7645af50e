"""A forecast as a picture: how long samples are, how many share a row, what rows and steps cost.

The only file here that imports matplotlib, and only when it draws. It uses figures without pyplot,
so there is no global state and no display to look for.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megasft.errors import FlagError, MissingPackageError
from megasft.packing.forecast import Forecast

INCHES: Final = (10.0, 7.0)
DOTS_PER_INCH: Final = 120
NUM_BINS: Final = 40
PLAIN, BEFORE, AFTER = "#4c78a8", "#bab0ac", "#f58518"


def plot_forecast(seen: Forecast, path: Path) -> None:
    """Draw four histograms into a PNG.

    Raises:
        MissingPackageError: matplotlib is not installed.
        FlagError: The file cannot be written.
    """
    figure_class = _import_figure()
    figure = figure_class(figsize=INCHES, layout="constrained")
    lengths, counts, costs, balance = figure.subplots(2, 2).flat
    _draw_lengths(lengths, seen)
    _draw_counts(counts, seen)
    _draw_costs(costs, seen)
    _draw_balance(balance, seen)
    for axes in (lengths, counts, costs, balance):
        axes.spines[["top", "right"]].set_visible(False)
    size = seen.run.shape.global_batch_size
    figure.suptitle(
        f"{len(seen.plan):,} rows of {seen.plan.row_tokens:,} tokens, "
        f"{100 * sum(seen.padding) / seen.total_tokens:.2f} % padding, "
        f"{seen.iterations:,.2f} iterations of {size:,} rows in an epoch"
    )
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise FlagError(
            f"--plot {path} cannot be written ({error.strerror}); name a file in an existing folder"
        ) from None


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "--plot needs the Python package matplotlib, which is not installed; "
            "pip install 'megasft[plot]', or leave --plot out"
        ) from None
    return Figure


def _draw_lengths(axes: Any, seen: Forecast) -> None:
    least, most = int(seen.lengths.min()), int(seen.lengths.max())
    bins = np.unique(np.geomspace(least, most + 1, NUM_BINS + 1).round())
    axes.hist(seen.lengths, bins=bins, color=PLAIN)
    axes.set(xlabel="tokens", ylabel="samples", title="length of a sample")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _mark(axes, float(seen.lengths.mean()), f"mean {seen.lengths.mean():,.0f}")


def _draw_counts(axes: Any, seen: Forecast) -> None:
    counts = seen.samples_per_row
    least, most = int(counts.min()), int(counts.max())
    step = max(1, -(-(most - least + 1) // NUM_BINS))
    axes.hist(counts, bins=np.arange(least, most + step + 1, step) - 0.5, color=PLAIN)
    axes.set(xlabel="samples", ylabel="rows", title="samples of a row")
    axes.locator_params(axis="x", integer=True)
    _mark(axes, float(counts.mean()), f"mean {counts.mean():,.1f}")


def _draw_costs(axes: Any, seen: Forecast) -> None:
    costs = seen.row_costs / seen.row_costs.mean()
    axes.hist(costs, bins=_bins(costs), color=PLAIN)
    axes.set(xlabel="cost over that of the mean row", ylabel="rows", title="cost of a row")
    _mark(axes, float(costs.max()), f"dearest {costs.max():.3f}")


def _draw_balance(axes: Any, seen: Forecast) -> None:
    title = f"slowest of {seen.run.shape.dp_size} data-parallel ranks"
    axes.set(xlabel="time over the mean of ranks", ylabel="global batches", title=title)
    if seen.balance is None:
        why = "one data-parallel rank:\nnothing to balance"
        if seen.run.shape.dp_size > 1:
            why = "the global batch cannot be split"
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    bins = _bins(np.concatenate(seen.balance))
    for ratios, color, name in zip(
        seen.balance, (BEFORE, AFTER), ("where rows come", "dealt by cost"), strict=True
    ):
        label = f"{name}: {ratios.mean():.3f} in the mean"
        axes.hist(ratios, bins=bins, color=color, alpha=0.8, label=label)
    axes.locator_params(axis="y", integer=True)
    axes.legend(frameon=False)


def _bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return borders of bins; a span of some thousandths at least, so that equal looks equal."""
    least, most = float(values.min()), float(values.max())
    span = max(most - least, 0.005)
    return np.linspace(least - 0.01 * span, least + 1.01 * span, NUM_BINS + 1)


def _mark(axes: Any, value: float, text: str) -> None:
    axes.axvline(value, color=AFTER, linestyle="--", label=text)
    axes.legend(frameon=False)
