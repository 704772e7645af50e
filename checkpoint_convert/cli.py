"""What both conversions take and print, and how their faults become exit codes."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from checkpoint_convert.engines import ENGINES
from checkpoint_convert.team import ALONE, Team
from megasft.errors import MegasftError

OWN: Final = "own"
"""The engine that is this package itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
        num_hf_tensors: Tensors on Hugging Face's side.
        num_megatron_tensors: On Megatron's side; the layers of one kind count once.
        num_bytes: Of the tensors written.
        is_verified: Whether every tensor was mapped back and compared bitwise.
        flags: Megatron's flags, when they were written.
        is_kept: Whether the output was there already, made from the same, and was left alone.
    """

    source: Path
    output: Path
    family_name: str
    dtypes: str
    num_hf_tensors: int
    num_megatron_tensors: int
    num_parameters: int
    num_bytes: int
    is_verified: bool
    flags: tuple[str, ...] = ()
    is_kept: bool = False


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags both directions have."""
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare what was written with where it came from: tensors bit for bit, "
        "configuration, files, and logits of both programs in float32 on the CPU",
    )
    parser.add_argument(
        "--engine",
        choices=(OWN, *ENGINES),
        default=OWN,
        help="own: this package's rules; a bridge, where one is installed, for other families "
        "(default: own)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion at --output"
    )


def show(report: Report) -> None:
    """Print a report to standard output."""
    if report.is_kept:
        print(f"exported already: {report.output}, from {report.source}")
        return
    verified = "bitwise equal" if report.is_verified else "not checked"
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("from", str(report.source)),
        ("to", str(report.output)),
        ("family", report.family_name),
        (
            "tensors",
            f"{report.num_hf_tensors:,} Hugging Face, {report.num_megatron_tensors:,} Megatron",
        ),
        ("parameters", f"{report.num_parameters:,} ({report.dtypes})"),
        ("bytes", f"{report.num_bytes:,}"),
        ("round trip", verified),
    ):
        table.add_row(name, value)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if report.flags:
        console.print("Megatron flags (megasft reads them from the checkpoint):")
        console.print(shlex.join(report.flags), markup=False)


def exit_code(conversion: Callable[[], Report | None], team: Team = ALONE) -> int:
    """Run a conversion and print its report; a user's fault is one message and exit code 1.

    Args:
        conversion: What every process of the team runs.
        team: Only its first process prints a report; any prints its fault.
    """
    try:
        report = conversion()
        if team.leads and report is not None:
            show(report)
    except MegasftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
