"""The proof as a table on the screen and as a Markdown report to keep or attach."""

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Final

from rich.table import Table

from megasft.compat import has
from megasft.proof import verdict
from megasft.proof.defects import DEFECTS
from megasft.proof.families import FAMILIES
from megasft.proof.prove import Settings
from megasft.proof.verdict import Verdict
from megasft.proof.world import BATCH, NUM_SAMPLES, ROW_TOKENS

COLUMNS: Final = ("model", "layout", "loss of", "loss", "gradient", "worst gradient", "parameters")

DEFINITION: Final = f"""\
Each line is a run of the real training entry point (`megasft.pretrain_sft`, Megatron's own loop)
on packed rows, in float32, with the same {BATCH} rows of {ROW_TOKENS} tokens as its first global
batch (out of {NUM_SAMPLES} random conversations; some without labels, some of 2 tokens, one as long
as its row). It is compared with plain Hugging Face in float64, where every conversation is a
sequence of its own and the mean is taken over all of them at once:

    turn    Σ_turns (Σ_tokens ce / n_turn) / Σ turns        sample   the same per conversation
    token   Σ_tokens ce / Σ tokens                          DFT      ce weighted by α·p + 1 − α
    weights      a turn's ce multiplied by its random weight, between 0.125 and 8, with DFT 0.8
    normalized   the same without DFT, divided by the sum of the units' weights instead of their
                 number, with router losses, which know of no weights

Errors are relative: |loss − truth| / truth, and ‖tensor − truth‖ / ‖truth‖ for the worst of all
gradients (before clipping) and of all parameters after one step of clipped AdamW."""


def tolerances() -> str:
    """Return what errors are allowed, in a line."""
    return (
        f"loss {verdict.LOSS_TOLERANCE:.0e}, gradients {verdict.GRADIENT_TOLERANCE:.0e}, "
        f"parameters {verdict.PARAMETER_TOLERANCE:.0e}"
    )


def cells(v: Verdict) -> tuple[str, ...]:
    """Return one line of the table, without the verdict."""
    if v.failure:
        return (v.family, v.layout, v.objective, "-", "-", v.failure, "-")
    errors = (f"{v.loss_error:.1e}", f"{v.gradient_error:.1e}")
    return (v.family, v.layout, v.objective, *errors, v.worst_gradient, f"{v.parameter_error:.1e}")


def table(verdicts: Sequence[Verdict]) -> Table:
    """Return the table for the screen; the objectives of a layout share a line when all hold."""
    shown = Table(title="relative errors against float64 Hugging Face", title_justify="left")
    shown.add_column("layout")
    for name in ("loss of", "loss", "gradient", "params"):
        shown.add_column(name, justify="left" if name == "loss of" else "right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    family = ""
    for v in summarized(verdicts):
        if v.family != family:
            family = v.family
            shown.add_section()
            shown.add_row(f"[bold]{family}[/]")
        verdict_text = "[green]exact[/]" if v.is_exact else "[red]WRONG[/]"
        errors = (v.loss_error, v.gradient_error, v.parameter_error)
        shown.add_row(v.layout, v.objective, *(f"{e:.1e}" for e in errors), verdict_text)
    return shown


def summarized(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the worst verdict of each layout, naming how many objectives it stands for."""
    groups: dict[tuple[str, str, int], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.family, v.layout, v.ranks), []).append(v)
    shown = []
    for group in groups.values():
        wrong = [v for v in group if not v.is_exact]
        if wrong or len(group) == 1:
            shown += wrong or group
            continue
        top = max(group, key=lambda v: v.gradient_error)
        shown.append(
            replace(
                top,
                objective=f"all {len(group)}",
                loss_error=max(v.loss_error for v in group),
                parameter_error=max(v.parameter_error for v in group),
                update_error=max(v.update_error for v in group),
                threads=max(v.threads for v in group),
            )
        )
    return shown


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """Return the outcome in one sentence."""
    wrong = [v for v in verdicts if not v.is_exact]
    layouts = {(v.family, v.layout, v.ranks) for v in verdicts}
    if wrong:
        return f"{len(wrong)} of {len(verdicts)} runs are not exact ({tolerances()})"
    return (
        f"exact: {len(verdicts)} runs on {len(layouts)} layouts; largest relative error of a loss "
        f"{max(v.loss_error for v in verdicts):.1e}, of a gradient "
        f"{max(v.gradient_error for v in verdicts):.1e}, of a parameter "
        f"{max(v.parameter_error for v in verdicts):.1e} (allowed: {tolerances()})"
    )


def markdown(verdicts: Sequence[Verdict], settings: Settings, *, command: str) -> str:
    """Return the whole report."""
    lines = ["# Loss and gradients on every layout", "", conclusion(verdicts) + ".", ""]
    if settings.defect:
        what = DEFECTS[settings.defect].what
        lines += [f"**A defect was injected** (`--break {settings.defect}`): {what}.", ""]
    lines += [DEFINITION, "", *_facts(settings, command)]
    lines += [f"- most threads of a rank's process: {max(v.threads for v in verdicts)}", ""]
    for family in settings.families:
        lines += [f"- `{family}`: {FAMILIES[family].what}"]
    header = (*COLUMNS, "update", "verdict")
    lines += ["", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for v in verdicts:
        row = (*cells(v), f"{v.update_error:.1e}", "exact" if v.is_exact else "**wrong**")
        lines.append(f"| {' | '.join(text.replace('|', '/') for text in row)} |")
    lines += ["", "*update*: of the optimizer step alone, all parameters together.", ""]
    return "\n".join(lines)


def _facts(settings: Settings, command: str) -> list[str]:
    """Return what someone needs to see the same numbers."""
    packages = ["megasft", "megatron-core", "torch", "transformers", "numpy"]
    packages += ["transformer-engine"] if has("transformer_engine") else []
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return [
        f"- command: `{command}`",
        f"- {versions}, Python {platform.python_version()}",
        f"- {_machine(settings.device)}, {datetime.now(UTC):%Y-%m-%d}",
        f"- allowed: {tolerances()}",
    ]


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU ({platform.machine()}), gloo"
