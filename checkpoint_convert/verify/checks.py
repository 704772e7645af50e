"""All checks of a conversion, in the order of what they cost."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.engines.model import described, engine_of
from checkpoint_convert.files import MANIFEST
from checkpoint_convert.hf_tensors import HFTensors
from checkpoint_convert.megatron_checkpoint import RELEASE, find_iteration
from checkpoint_convert.tensor_map import EMBEDDING
from checkpoint_convert.verify import logits as logits_of
from checkpoint_convert.verify import manifest as manifests
from checkpoint_convert.verify import memory, side_files, tensors
from checkpoint_convert.verify.layouts import combined, name_of
from checkpoint_convert.verify.verification import Verification, failed
from megasft.checks.engine import Finding
from megasft.errors import ConversionError
from megasft.ranks.layout import Layout


def verify(
    hf: Path,
    checkpoint: Path,
    *,
    worker: str | None,
    hf_out: Path | None = None,
    layouts: Sequence[Layout] | None = None,
    by_layer: bool | None = None,
    tolerance: float = logits_of.TOLERANCE,
    manifest: Path | None = None,
    iteration: int | None = None,
    called: Mapping[Path, Path] | None = None,
) -> Verification:
    """Compare a checkpoint with the Hugging Face folder it was made of, or that was made of it.

    Args:
        hf: Hugging Face folder; the truth.
        checkpoint: Converted checkpoint, or what ``--save`` named.
        worker: Module that runs Megatron's model in processes of its own, a list of
            ``megatron.forward.Case``; None: neither model is run.
        hf_out: Folder converted back from the checkpoint, which should equal ``hf``.
        layouts: Of Megatron's model; default: one process, and two of everything that divides.
        by_layer: Run them with one layer in memory; default: when the model in float32 needs more
            than half of the memory that is there.
        tolerance: Largest difference of logits, relative to the largest logit or 1.
        manifest: File to write; default: ``verification.json`` in ``checkpoint`` and ``hf_out``.
        iteration: Of the checkpoint; default: the latest.
        called: How the record calls a folder that does not have its name yet.

    Returns:
        Every check; a difference is a check that failed, not an error.

    Raises:
        ConversionError: There is nothing to compare: a folder is missing or unreadable, or the
            manifest cannot be written.
    """
    engine = engine_of(checkpoint)
    model = described(hf, checkpoint) if engine else read_model(hf)
    source = find_iteration(checkpoint, iteration=iteration)
    stored = tensors.require_tensors(hf)
    stored.leave_out(side_files.left_out(checkpoint, stored))
    returned = tensors.require_tensors(hf_out) if hf_out else None
    with _progress() as progress:
        run = _Run(hf, checkpoint, source, hf_out, model, progress)
        checks = [side_files.check_side_folder(hf, checkpoint)]
        if engine and worker is None:
            detail = f"made by {engine}, so the logits are all there is to compare"
            checks.append(failed("logits", f"{detail}, and they were left out"))
        if not engine:
            checks.insert(0, _attempt("flags", lambda: side_files.check_flags(checkpoint, model)))
            checks.append(run.tensors(stored))
        if hf_out is not None and returned is not None:
            checks += run.returned(stored, hf_out, returned)
        if worker is not None:
            subject = _subject(run, stored, layouts, by_layer=by_layer, tolerance=tolerance)
            checks += run.logits(subject, worker)
    names = called or {}
    verification = Verification(
        hf=str(names.get(hf, hf)),
        checkpoint=str(names.get(checkpoint, checkpoint)),
        iteration=source.name,
        hf_out=str(names.get(hf_out, hf_out)) if hf_out else None,
        checks=tuple(checks),
    )
    places = [folder / MANIFEST for folder in (checkpoint, hf_out) if folder]
    manifests.write([manifest] if manifest else places, verification, run.prints, hf=hf)
    return verification


class _Run:
    """One verification while it runs."""

    def __init__(
        self,
        hf: Path,
        checkpoint: Path,
        source: Path,
        hf_out: Path | None,
        model: Model,
        progress: Progress,
    ) -> None:
        self.hf, self.checkpoint, self.source, self.hf_out = hf, checkpoint, source, hf_out
        self.model, self.progress = model, progress
        self.prints: dict[str, tensors.Fingerprint] = {}

    def tensors(self, stored: HFTensors) -> Finding:
        bar = self.progress.add_task("tensors", total=tensors.count(self.model))

        def check() -> Finding:
            found, self.prints = tensors.check_checkpoint(
                stored,
                self.source,
                self.model,
                is_conversion=self.source.name == RELEASE,
                done=lambda: self.progress.advance(bar),
            )
            return found

        return _attempt("tensors", check)

    def returned(self, stored: HFTensors, hf_out: Path, returned: HFTensors) -> list[Finding]:
        bar = self.progress.add_task("returned tensors", total=len(stored))
        config = self.model.hf_config
        return [
            _attempt("returned config", lambda: side_files.check_returned_config(config, hf_out)),
            side_files.check_files(self.hf, hf_out, name="returned files", but=["config.json"]),
            _attempt(
                "returned tensors",
                lambda: tensors.check_returned(
                    stored, returned, self.model, done=lambda: self.progress.advance(bar)
                ),
            ),
        ]

    def logits(self, subject: logits_of.Subject, worker: str) -> list[Finding]:
        bar = self.progress.add_task("logits", total=logits_of.count(subject))
        with tempfile.TemporaryDirectory(prefix="megasft-verify-") as folder:
            try:
                (checks,) = logits_of.check_logits(
                    [subject],
                    worker=worker,
                    folder=Path(folder),
                    done=lambda steps: self.progress.update(bar, completed=steps),
                )
            except ConversionError as error:
                return [failed("logits", str(error))]
        return checks


def _subject(
    run: _Run,
    stored: HFTensors,
    layouts: Sequence[Layout] | None,
    *,
    by_layer: bool | None,
    tolerance: float,
) -> logits_of.Subject:
    """Decide what fits into memory, and say what does not."""
    size = memory.float32_bytes(stored)
    is_by_layer = memory.needs_layers(size) if by_layer is None else by_layer
    notes: list[str] = []
    chosen = tuple(dict.fromkeys(layouts or (Layout(), combined(run.model))))
    if is_by_layer:
        if layouts and any(layout.ranks > 1 for layout in layouts):
            raise ConversionError(
                "layer by layer there is one process, and layouts have no effect; leave --layout "
                f"out, or give the {size:,} bytes of the model in float32 and pass --whole"
            )
        notes.append("no parallel layout was tried layer by layer")
    elif not layouts:
        too_large = [layout for layout in chosen if not memory.fits(layout, size)]
        too_large = [layout for layout in too_large if layout.ranks > 1]
        notes += [f"{name_of(layout)} left out for want of memory" for layout in too_large]
        chosen = tuple(layout for layout in chosen if layout not in too_large)
    rounded_to = None if run.source.name == RELEASE else stored.dtype(EMBEDDING)
    if rounded_to is torch.float32:
        rounded_to = None
    if rounded_to is not None:
        notes.append(f"the checkpoint's parameters were rounded to the folder's {rounded_to}")
    return logits_of.Subject(
        hf=run.hf,
        checkpoint=run.checkpoint,
        iteration=run.source.name,
        model=run.model,
        layouts=chosen,
        by_layer=is_by_layer,
        rounded_to=rounded_to,
        tolerance=tolerance,
        notes=tuple(notes),
    )


def _attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """Make a check; when what it compares is not even comparable, that is its answer."""
    try:
        return check()
    except ConversionError as error:
        return failed(name, str(error))


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
