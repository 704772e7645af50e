"""Sums of a step to what is reported of it: means that are never 0 / 0, counts, speed.

What has no labels is left out, not reported as 0 or nan: a mean of nothing would draw a dip into
every curve. Keys of a record that OpenSFT prints too (``epoch``, ``steps``, ``lr``, ``loss`` and
``CATEGORY_loss``) have its names, so that scripts over its logs work on ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from megasft.loss.breakdown import (
    CATEGORIES,
    LAST_POSITION,
    LENGTH_EDGES,
    LENGTHS,
    POSITIONS,
    WEIGHTED_CE,
    WHOLE,
    named,
)

POSITION_NAMES: Final = (*(str(n) for n in range(1, LAST_POSITION)), f"{LAST_POSITION}+")
"""Names of turn positions: the first, second, ... turn of a sample."""

LENGTH_NAMES: Final = (
    *(f"{a}-{b - 1}" for a, b in zip((1, *LENGTH_EDGES[:-1]), LENGTH_EDGES, strict=True)),
    f"{LENGTH_EDGES[-1]}+",
)
"""Names of turn lengths, in label tokens."""

_OWN_KEYS: Final = ("loss", "token_loss", "sample_loss", "turn_loss", "dft_loss")
_GROUPS: Final = {
    "categories": "category",
    "turn_positions": "turn",
    "turn_lengths": "turn_length",
}
"""Keys of a line whose values are means by name, and what they are called in tags."""


class Means(NamedTuple):
    """Some labels of a step: those of a category, of all first turns, ...

    Attributes:
        loss: Cross entropy per label token.
        turn_loss: The same as a mean over turns.
        p_correct: Mean probability of the right token.
        labels: Label tokens.
        turns: Turns.
    """

    loss: float
    turn_loss: float
    p_correct: float
    labels: int
    turns: int


@dataclass(frozen=True, slots=True)
class Losses:
    """All labels of a step or of a validation set.

    Attributes:
        loss: What is optimised, by the run's objective, with the weights of turns and its DFT. All
            others but that of DFT are plain.
        token_loss: Plain cross entropy per label token.
        sample_loss: Its mean over samples.
        turn_loss: Its mean over turns.
        dft_loss: What dynamic fine-tuning optimises, as a mean by the run's objective; at full
            strength when the run has it switched off.
        p_correct: Mean probability of the right token.
        labels: Label tokens.
        turns: Turns.
        samples: Samples that have a label.
        divisor: What ``loss`` is a sum divided by: units, or their weights where normalized.
        categories: Means by name of category; those without labels are left out.
        turn_positions: Means by the turn's place in its sample; see ``POSITION_NAMES``.
        turn_lengths: Means by the turn's label tokens; see ``LENGTH_NAMES``.
    """

    loss: float
    token_loss: float
    sample_loss: float
    turn_loss: float
    dft_loss: float
    p_correct: float
    labels: int
    turns: int
    samples: int
    divisor: float
    categories: Mapping[str, Means] = field(default_factory=dict)
    turn_positions: Mapping[str, Means] = field(default_factory=dict)
    turn_lengths: Mapping[str, Means] = field(default_factory=dict)


class Speed(NamedTuple):
    """How fast a step was; rates are per rank.

    Attributes:
        seconds: From the first micro-batch of the step to the end of the optimizer's step.
        tokens: True tokens per second, padding not counted.
        labels: Label tokens per second.
        tflops: Megatron's count of the model's operations over true document lengths, in 1e12/s.
        mfu: That as a part of what the device can do; None where its peak is not known.
    """

    seconds: float
    tokens: float
    labels: float
    tflops: float
    mfu: float | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A training step.

    Attributes:
        step: From 1.
        num_steps: Of the run.
        epoch: Epochs trained after this step.
        losses: None when the step had no label.
        padding: Part of the positions that is padding.
        speed: Of this step.
        grad_norm: Before clipping; None where Megatron computed none.
        learning_rate: The step was made with.
        memory_gib: Peak of rank 0's device; on a CPU what the process has now.
        is_skipped: The gradient was not finite, and nothing was updated.
        time: Seconds since 1970 at the end of the step.
    """

    step: int
    num_steps: int
    epoch: float
    losses: Losses | None
    padding: float
    speed: Speed
    grad_norm: float | None
    learning_rate: float | None
    memory_gib: float
    is_skipped: bool
    time: float


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """An evaluation of all validation sets.

    Attributes:
        step: Steps trained before it.
        sets: Losses by name of the set; None for one without a label.
        time: Seconds since 1970.
    """

    step: int
    sets: Mapping[str, Losses | None]
    time: float


Record = StepRecord | ValidationRecord
"""What a sink is given."""


def losses_of(
    slots: Sequence[Sequence[float]],
    categories: Sequence[str],
    *,
    objective: str,
    dft_alpha: float,
    weight_scale: float = 1.0,
) -> Losses | None:
    """Divide the sums of a set, once.

    Args:
        slots: The set's sums of all ranks, see ``megasft.loss.breakdown``.
        categories: Name of each category, in the order of the slots; one without a name is not
            reported.
        objective: Of the run.
        dft_alpha: Of the run.
        weight_scale: Units over the sum of their weights, where weights are normalized.

    Returns:
        None when the set has no label.
    """
    whole = named(slots[WHOLE])
    if not whole["labels"]:
        return None
    means = {
        "token": whole["ce"] / whole["labels"],
        "turn": whole["ce_per_turn"] / whole["turns"],
        "sample": whole["ce_per_sample"] / whole["samples"],
    }
    units = whole[{"token": "labels", "turn": "turns", "sample": "samples"}[objective]]
    loss = means[objective]
    if WEIGHTED_CE in whole:
        loss = weight_scale * whole[WEIGHTED_CE] / units
    full_dft = weight_scale * whole["weighted_p_ce"] / units
    alpha = dft_alpha or 1.0
    dft_loss = alpha * full_dft + (1.0 - alpha) * loss
    return Losses(
        loss=dft_loss if dft_alpha else loss,
        token_loss=means["token"],
        sample_loss=means["sample"],
        turn_loss=means["turn"],
        dft_loss=dft_loss,
        p_correct=whole["p"] / whole["labels"],
        labels=round(whole["labels"]),
        turns=round(whole["turns"]),
        samples=round(whole["samples"]),
        divisor=units / weight_scale,
        categories=_means(slots[CATEGORIES], categories),
        turn_positions=_means(slots[POSITIONS], POSITION_NAMES),
        turn_lengths=_means(slots[LENGTHS], LENGTH_NAMES),
    )


def _means(slots: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Means]:
    """Return the means of slots that have a name and labels."""
    found = {}
    # Another set may have more categories, and so slots that this one has no name for.
    for name, sums in zip(names, slots, strict=False):
        row = named(sums)
        if row["labels"] and name:
            found[name] = Means(
                row["ce"] / row["labels"],
                row["ce_per_turn"] / row["turns"],
                row["p"] / row["labels"],
                round(row["labels"]),
                round(row["turns"]),
            )
    return found


def perplexity(token_loss: float) -> float:
    """Return e to the loss per token; what is too large for a float is the largest one."""
    return math.exp(min(token_loss, 700.0))


def as_json(record: Record) -> dict[str, Any]:
    """Return what a line of the jsonl file holds."""
    if isinstance(record, ValidationRecord):
        sets = {name: None if x is None else _losses(x) for name, x in record.sets.items()}
        return {"steps": record.step, "time": record.time, "validation": sets}
    speed = record.speed
    head = {"epoch": record.epoch, "steps": record.step, "lr": record.learning_rate}
    losses: dict[str, Any] = dict.fromkeys(_OWN_KEYS) | {key: {} for key in _GROUPS}
    if record.losses is not None:
        losses = _losses(record.losses)
    tail = {
        "padding": record.padding,
        "seconds": speed.seconds,
        "tokens_per_second": speed.tokens,
        "labels_per_second": speed.labels,
        "tflops": speed.tflops,
        "mfu": speed.mfu,
        "grad_norm": record.grad_norm,
        "memory_gib": record.memory_gib,
        "skipped": record.is_skipped,
        "time": record.time,
    }
    return head | losses | tail


def _losses(losses: Losses) -> dict[str, Any]:
    own: dict[str, Any] = {name: getattr(losses, name) for name in _OWN_KEYS}
    own |= {
        "avg_p_correct": losses.p_correct,
        "perplexity": perplexity(losses.token_loss),
        "labels": losses.labels,
        "turns": losses.turns,
        "samples": losses.samples,
    }
    flat = {f"{name}_loss": means.loss for name, means in losses.categories.items()}
    # A category called "turn" is found among the categories alone.
    nested = {
        group: {name: means._asdict() for name, means in getattr(losses, group).items()}
        for group in _GROUPS
    }
    return flat | own | nested


def scalars(record: Record) -> dict[str, float]:
    """Return what trackers draw, by tag; what is not known of this step is left out.

    Example:
        ``train/loss``, ``train/grad_norm``, ``category/maths``, ``eval/valid-store/loss``
    """
    if isinstance(record, ValidationRecord):
        found: dict[str, float] = {}
        for name, losses in record.sets.items():
            found |= {} if losses is None else _tags(_losses(losses), prefix=f"eval/{name}")
        return found
    return _tags(as_json(record), prefix="train")


def _tags(line: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    skipped = {"steps", "time", "perplexity" if prefix == "train" else ""}
    categories = {f"{name}_loss" for name in line.get("categories", {})} - set(_OWN_KEYS)
    found: dict[str, float] = {}
    for key, value in line.items():
        if key in _GROUPS:
            at = f"{prefix}/{_GROUPS[key]}" if prefix != "train" else _GROUPS[key]
            found |= {f"{at}/{name}": float(means["loss"]) for name, means in value.items()}
        elif value is not None and key not in skipped | categories:
            found[f"{prefix}/{key}"] = float(value)
    return found
