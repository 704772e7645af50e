"""The flags of what a run reports, and where to."""

import argparse
from pathlib import Path
from typing import Any, Final

from megasft.compat import has
from megasft.errors import FlagError, MissingPackageError
from megasft.report.sinks import TRACKERS

FOLDER: Final = "log"
"""Log folder of a run inside ``--save``."""


def add_report_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags to the group of ours."""
    group.add_argument(
        "--megasft-log-dir",
        metavar="DIR",
        help="where a line of JSON per step is written, steps.jsonl; a run that resumes goes on "
        f"with it (default: {FOLDER} in --save; without either no file is written)",
    )
    group.add_argument(
        "--megasft-console-interval",
        type=int,
        default=1,
        metavar="N",
        help="print a line every N steps; 0 prints none (default: 1). Megatron's own lines have "
        "--log-interval",
    )
    group.add_argument(
        "--megasft-table-interval",
        type=int,
        default=100,
        metavar="N",
        help="print a table by category, turn position and turn length every N steps, and after "
        "each evaluation; 0 prints none (default: 100)",
    )
    group.add_argument(
        "--megasft-track",
        nargs="+",
        choices=TRACKERS,
        default=[],
        metavar="NAME",
        help=f"also log to {', '.join(TRACKERS)}; projects and names are set by their own "
        "environment variables",
    )
    group.add_argument(
        "--megasft-spikes",
        type=float,
        default=1.5,
        metavar="F",
        help="keep the losses of a step's conversations in spikes.jsonl when the loss is above F "
        "times the median of the 50 steps before, for `megasft spikes`; 0 keeps none (default: "
        "1.5)",
    )
    group.add_argument(
        "--megasft-peak-tflops",
        type=float,
        metavar="P",
        help="what a device can do, in 1e12 operations per second, for model FLOPs utilization "
        "(default: from a table of devices in megasft/report/devices.py; not reported for others)",
    )


def check_report(args: Any) -> None:
    """Refuse report flags that cannot work, before anything starts.

    Raises:
        FlagError: An interval or factor below 0, a peak that is not above 0, two W&B runs.
        MissingPackageError: A tracker is not installed.
    """
    for flag in ("console", "table"):
        value = getattr(args, f"megasft_{flag}_interval")
        if value < 0:
            raise FlagError(f"--megasft-{flag}-interval is {value}; 0 prints none")
    if args.megasft_peak_tflops is not None and args.megasft_peak_tflops <= 0:
        raise FlagError(
            f"--megasft-peak-tflops is {args.megasft_peak_tflops}; give what one device can do"
        )
    if args.megasft_spikes < 0:
        raise FlagError(f"--megasft-spikes is {args.megasft_spikes}; 0 keeps no losses")
    missing = [name for name in args.megasft_track if not has(name)]
    if missing:
        raise MissingPackageError(
            f"--megasft-track {' '.join(missing)}: not installed; pip install megasft[track]"
        )
    if "wandb" in args.megasft_track and args.wandb_project:
        raise FlagError(
            "--megasft-track wandb and Megatron's --wandb-project would make two runs in W&B; "
            "drop the latter and set WANDB_PROJECT"
        )


def log_folder(args: Any) -> Path | None:
    """Return where the run keeps its log; None when it keeps none."""
    if args.megasft_log_dir:
        return Path(args.megasft_log_dir)
    return Path(args.save) / FOLDER if args.save else None
