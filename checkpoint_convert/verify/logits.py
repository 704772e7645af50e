"""What both programs expect of every next word: transformers' model against Megatron's.

Two programs that compute the same in float32 differ by rounding, and rounding is relative to the
largest numbers of a computation, so what is allowed is relative to the largest logit. Measured on
this package's test models (two or three layers, logits up to 4) the difference is 1e-6 to 6e-6, and
on a random model of 24 layers, 1,024 wide, 4e-5 with logits up to 27; on a checkpoint that is wrong
in the smallest way tried, a rope base off by a thousandth, it is 1.5e-3.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from checkpoint_convert.config_map import Model
from checkpoint_convert.verify import hf_model
from checkpoint_convert.verify.hf_model import LAYER_TOLERANCE
from checkpoint_convert.verify.layouts import flags_of, name_of
from checkpoint_convert.verify.text import Row, make_row
from checkpoint_convert.verify.verification import failed, passed
from megasft.checks.engine import Finding
from megasft.errors import ConversionError
from megasft.files import MODEL_FILE
from megasft.megatron.forward import Case
from megasft.ranks import jobs
from megasft.ranks.layout import Layout

TOLERANCE: Final = 1e-5
"""Of the largest logit, or of 1 when all are smaller: some hundred roundings of float32 (6e-8) on
top of one another, which is what a deep model makes of them, and a hundredth of the smallest fault
tried."""

MOST_NEAR_A_TIE: Final = 0.1
"""Share of the tokens of a layer whose experts may be a matter of rounding; above it a comparison
proves too little."""

SILENT_SECONDS: Final = 1800
"""Processes that show nothing for so long hang: a layer takes seconds, a whole model minutes."""

WANTED: Final = "wanted.pt"
"""File of Hugging Face's logits."""

SHOWN: Final = 6
"""Layers that a report names, of those that are wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint whose logits are compared, and how.

    Attributes:
        hf: Folder that is the truth.
        checkpoint: What Megatron loads.
        iteration: Name of the folder in it.
        model: What conversion knows of the truth.
        layouts: To load at. Layer by layer there is one process, and they have no effect.
        by_layer: Whether one layer at a time is in memory.
        rounded_to: What a trained checkpoint's parameters are rounded to before, as its folder's
            were when it was exported.
        tolerance: Of the largest logit.
        notes: What the details shall say beside the figures.
    """

    hf: Path
    checkpoint: Path
    iteration: str
    model: Model
    layouts: tuple[Layout, ...] = (Layout(),)
    by_layer: bool = False
    rounded_to: torch.dtype | None = None
    tolerance: float = TOLERANCE
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Planned:
    subject: Subject
    layout: Layout
    row: Row
    case: Case

    @property
    def folder(self) -> Path:
        return Path(self.case.output).parent

    @property
    def num_steps(self) -> int:
        return self.case.num_layers_done or int(Path(self.case.output).exists())


def check_logits(
    subjects: Sequence[Subject], *, worker: str, folder: Path, done: Callable[[int], None]
) -> list[list[Finding]]:
    """Compare the logits of several checkpoints; cases of one number of processes share a start.

    Args:
        subjects: What to compare.
        worker: Module that runs Megatron's side, a list of ``Case``.
        folder: For logits and hidden states; the caller removes it.
        done: Called with how many steps are done, of ``count`` for each subject.

    Returns:
        The checks of each subject.

    Raises:
        ConversionError: Transformers cannot run a model of the folders.
    """
    planned: list[_Planned] = []
    steps = 0
    for number, subject in enumerate(subjects):
        planned += _plan(subject, folder / str(number), lambda n, at=steps: done(at + n))  # type: ignore[misc]
        steps += _hf_steps(subject)

    def num_steps() -> int:
        of_megatron = sum(plan.num_steps for plan in planned)
        done(steps + of_megatron)
        return of_megatron

    failures: dict[str, str] = {}
    for ranks in sorted({plan.layout.ranks for plan in planned}):
        cases = [plan.case for plan in planned if plan.layout.ranks == ranks]
        ended = jobs.run(
            [asdict(case) for case in cases],
            world_size=ranks,
            module=worker,
            folder=folder,
            silent_seconds=SILENT_SECONDS,
            imports=(worker,),
            num_steps=num_steps,
            advice="; try --by-layer",
        )
        failures |= {c.output: why for c, why in zip(cases, ended, strict=True)}
    return [
        [
            check
            for plan in planned
            if plan.subject is subject
            for check in _judge(plan, failures[plan.case.output])
        ]
        for subject in subjects
    ]


def count(subject: Subject) -> int:
    """Return how many steps a subject takes."""
    return _hf_steps(subject) * (2 if subject.by_layer else 1 + len(subject.layouts))


def _hf_steps(subject: Subject) -> int:
    return subject.model.num_layers if subject.by_layer else 1


def _plan(subject: Subject, folder: Path, done: Callable[[int], None]) -> list[_Planned]:
    """Compute Hugging Face's side, and say what Megatron's shall be."""
    folder.mkdir(parents=True)
    try:
        row, logits = _of_hugging_face(subject, folder, done)
    except Exception as error:  # whatever transformers raises
        raise ConversionError(
            f"transformers cannot run {subject.hf}: {' '.join(str(error).split())[:400]}; does "
            "AutoModelForCausalLM.from_pretrained() load it?"
        ) from error
    torch.save(logits, folder / WANTED)
    return [
        _Planned(
            subject,
            layout,
            row,
            Case(
                model_flags=_model_flags(subject),
                flags=flags_of(layout, subject.model),
                checkpoint=str(subject.checkpoint.resolve()),
                iteration=subject.iteration,
                documents=row.documents,
                output=str(folder / f"found{i}.pt"),
                hidden=str(folder) if subject.by_layer else None,
                rounded_to=str(subject.rounded_to or "").removeprefix("torch.") or None,
            ),
        )
        for i, layout in enumerate((Layout(),) if subject.by_layer else subject.layouts)
    ]


def _of_hugging_face(
    subject: Subject, folder: Path, done: Callable[[int], None]
) -> tuple[Row, torch.Tensor]:
    row = make_row(subject.hf, subject.model, hf_model.read_config(subject.hf))
    if not subject.by_layer:
        logits = hf_model.logits(subject.hf, row)
        done(1)
        return row, logits
    finished = iter(range(1, subject.model.num_layers + 1))
    logits = hf_model.logits_by_layer(
        subject.hf, row, hidden=folder, done=lambda: done(next(finished))
    )
    return row, logits


def _model_flags(subject: Subject) -> tuple[str, ...]:
    """Return the model's flags, unless the checkpoint brings those a training run would read."""
    return () if (subject.checkpoint / MODEL_FILE).is_file() else subject.model.flags


def _judge(plan: _Planned, failure: str) -> list[Finding]:
    name = f"logits {'by layer' if plan.subject.by_layer else name_of(plan.layout)}"
    if failure:
        return [failed(name, f"Megatron gave none: {failure}")]
    wanted, found = (
        torch.load(path, weights_only=True) for path in (plan.folder / WANTED, plan.case.output)
    )
    checks = [compare(name, found, wanted, plan.row, plan.subject)]
    if plan.subject.by_layer:
        content = orjson.loads(Path(plan.case.output).with_suffix(".layers").read_bytes())
        checks.insert(0, _judge_layers(content["errors"], content["peak_bytes"], plan))
    return checks


def compare(
    name: str, found: torch.Tensor, wanted: torch.Tensor, row: Row, subject: Subject
) -> Finding:
    """Compare logits.

    Args:
        name: Of the check.
        found: float32 [tokens, vocabulary], Megatron's.
        wanted: float32 [tokens, vocabulary], Hugging Face's.
        row: The tokens.
        subject: Tolerance, and whether experts may be near a tie.
    """
    if found.shape != wanted.shape:
        detail = (
            f"Megatron's are [tokens, vocabulary] = {list(found.shape)}, Hugging Face's "
            f"{list(wanted.shape)}: the vocabularies differ"
        )
        return failed(name, detail)
    errors = (found - wanted).abs().nan_to_num(nan=torch.inf)
    token, entry = divmod(int(errors.argmax()), errors.shape[1])
    error, largest = float(errors.max()), float(wanted.abs().max())
    allowed = subject.tolerance * max(1.0, largest)
    is_ok = error <= allowed
    agree = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    figures = {
        "max_difference": error,
        "allowed": allowed,
        "token": token,
        "vocabulary_entry": entry,
        "largest_logit": largest,
        "same_best_token": agree,
        "tokens": row.num_tokens,
        "longest_document": row.longest,
        "source": row.source,
    }
    what = (
        f"{row.num_tokens:,} tokens in {len(row.documents)} documents up to {row.longest:,} "
        f"({row.source}): max |Δ| {error:.1e} of logits up to {largest:.1f}, {allowed:.1e} allowed"
    )
    if is_ok:
        return passed(name, "; ".join((what, *subject.notes)), figures)
    bad = (errors.amax(-1) > allowed).sum()
    where = f", at {row.place(token)}, entry {entry:,}; {int(bad):,} tokens are wrong"
    where += f", and {agree:.0%} have the same best next token"
    return failed(name, "; ".join((what + where, *_advice(subject), *subject.notes)), figures)


def _advice(subject: Subject) -> list[str]:
    """Say what a difference in logits may come of."""
    advice = [
        "if the tensors are equal, the configuration or its flags, or a rule that is wrong on both "
        "ways, is not"
    ]
    if subject.model.num_experts and not subject.by_layer:
        advice.append(
            "of a few tokens it may be a router near a tie, where rounding chooses other experts: "
            "--by-layer tells the two apart"
        )
    return advice


def _judge_layers(errors: list[list[float]], peak_bytes: int, plan: _Planned) -> Finding:
    """Compare hidden states, embedding first."""
    found_LT = torch.tensor(errors, dtype=torch.float64).nan_to_num(nan=torch.inf)
    near_LT = torch.zeros_like(found_LT, dtype=torch.bool)
    for i in range(len(found_LT) - 1):
        near_LT[i + 1] = torch.load(plan.folder / f"{i}.near.pt", weights_only=True)
    is_bad_LT = (found_LT > LAYER_TOLERANCE) & ~near_LT
    sure_LT = found_LT.where(~near_LT, 0.0)
    layer, token = divmod(int(sure_LT.argmax()), sure_LT.shape[1])
    share = float(near_LT.float().mean(1).max())
    figures: dict[str, Any] = {
        "max_relative_error": float(sure_LT.max()),
        "allowed": LAYER_TOLERANCE,
        "near_a_tie": int(near_LT.sum()),
        "errors": sure_LT.amax(1).tolist(),
        "megatron_peak_bytes": peak_bytes,
    }
    names = ["the embedding", *(f"layer {i}" for i in range(len(found_LT) - 1))]
    detail = (
        f"{len(found_LT) - 1} layers, each from Hugging Face's own input: largest relative error "
        f"{figures['max_relative_error']:.1e} ({names[layer]}, {plan.row.place(token)}), "
        f"{LAYER_TOLERANCE:.0e} allowed"
    )
    if figures["near_a_tie"]:
        detail += f"; {figures['near_a_tie']:,} outputs left out, whose experts rounding may change"
    bad = [
        f"{name} ({int(is_bad_T.sum()):,} tokens)"
        for name, is_bad_T in zip(names, is_bad_LT, strict=True)
        if is_bad_T.any()
    ]
    if bad:
        more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        detail += f"; wrong: {', '.join(bad[:SHOWN])}{more}"
    if share > MOST_NEAR_A_TIE:
        detail += f"; of one layer {share:.0%} are left out, which proves too little"
    judged = failed if bad or share > MOST_NEAR_A_TIE else passed
    return judged("layers", detail, figures)
