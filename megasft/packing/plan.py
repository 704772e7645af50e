"""The row plan: which samples make which row, what an epoch holds, and its cache beside the store.

A plan is computed from lengths alone, so sequence length, context parallelism and seed change
without tokenizing again. It is cheap (see ``balanced.py``), so every rank may compute it: nothing
is broadcast and nobody waits for rank 0. The cache file carries the key of everything the plan
depends on (packer, store fingerprint, sizes, seed, draw); a file made for anything else is not read
but made again.

With a mixture the plan holds the samples it drew, one drawn twice in two places, so a new mixture
needs no new tokens. Rows are packed within a stage of the curriculum, and stages follow each other;
each costs a last row that is not full.

Epochs train the same rows in another order, unless several packings are asked for: these are stages
of one long plan, so that the position of a run stays one integer whatever their numbers of rows.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from megasft.draw import Draw
from megasft.errors import PlanError
from megasft.packing.cost_window import CostWindow, WindowedOrder
from megasft.packing.order import RowAtPosition, RowOrder
from megasft.packing.pack import DEFAULT_PACKER, PACKERS
from megasft.packing.rows import Packer, Rows, Seed
from megasft.schema import TURN_FIELDS, turn_weights_of
from megasft.store import TokenStore

PLAN_VERSION: Final = 1

UNITS: Final = {"turn": "turns", "sample": "labelled_samples", "token": "labels"}
"""Objective -> the count of a ``RowPlan`` that its loss is divided by."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows of a store, and what they hold.

    Attributes:
        rows: Which samples make which row.
        row_tokens: Tokens of a row, padding counted.
        align_tokens: Each document takes a multiple of this many tokens.
        turns: int64 [R]. Supervised turns of each row.
        labelled_samples: int64 [R]. Samples of each row that have a turn.
        labels: int64 [R]. Label tokens of each row.
        tokens: int64 [R]. True tokens of each row, padding not counted.
        unit_weights: float64 [R] by objective (``turn``, ``sample``, ``token``). Sum of the weights
            of a row's units, that of a label being its turn's, and that of a sample the mean over
            its labels; the number of units where every turn weighs 1.
        squares: int64 [R]. Sum of the squared lengths of a row's documents as attention computes
            them, padding counted.
        too_long: int64. Samples that fit no row and are left out.
        identity: Everything the rows depend on, readable; a run resumes on no other plan.
        stages: Row at which each stage starts, and where the last ends.
        num_packings: How often every sample is in the plan, each time in other rows.
        warnings: What went wrong beside it, in sentences: the plan could not be cached.
    """

    rows: Rows
    row_tokens: int
    align_tokens: int
    turns: npt.NDArray[np.int64]
    labelled_samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    unit_weights: dict[str, npt.NDArray[np.float64]]
    squares: npt.NDArray[np.int64]
    too_long: npt.NDArray[np.int64]
    identity: str
    stages: tuple[int, ...]
    num_packings: int = 1
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch_rows(self) -> float:
        """Rows of an epoch; with several packings the mean, because they may differ by some."""
        return len(self) / self.num_packings

    @property
    def units(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return int64 [R] by objective: what each row adds to the divisor of the loss."""
        return {objective: getattr(self, name) for objective, name in UNITS.items()}

    def order(self, *, seed: int, window: CostWindow | None = None) -> RowAtPosition:
        """Return the order in which a run trains the rows, before they are dealt to ranks.

        Args:
            seed: Of the run.
            window: Sort neighbouring global batches by cost.
        """
        order = RowOrder(num_rows=len(self), seed=seed, stages=self.stages)
        return order if window is None else WindowedOrder(order, self.squares, window)

    def summary(self, *, global_batch_size: int) -> str:
        """Return one line with what an epoch holds, in rows, turns, tokens and iterations."""
        padding = 100 * (1 - int(self.tokens.sum()) / (len(self) * self.row_tokens))
        num_stages = (len(self.stages) - 1) // self.num_packings
        in_stages = " + ".join(f"{b - a:,}" for a, b in pairwise(self.stages[: num_stages + 1]))
        stages = f" in {num_stages} stages, {in_stages}" if num_stages > 1 else ""
        several = self.num_packings > 1
        end = f" in {self.num_packings} packings, one an epoch:" if several else ","
        all_epochs = (
            self.rows.samples.size,
            self.turns.sum(),
            self.tokens.sum(),
            self.labels.sum(),
        )
        samples, turns, tokens, labels = (int(n) // self.num_packings for n in all_epochs)
        return (
            f"{len(self):,} rows of {self.row_tokens:,} tokens ({padding:.2f} % padding){stages}"
            f"{end} {samples:,} samples, {turns:,} turns, "
            f"{tokens:,} tokens, {labels:,} of them labels; "
            f"an epoch is {self.epoch_rows / global_batch_size:,.2f} iterations of "
            f"{global_batch_size:,} rows"
        )


def plan_rows(
    store: TokenStore,
    *,
    row_tokens: int,
    align_tokens: int,
    seed: int,
    cache: Path | None = None,
    draw: Draw | None = None,
    packer: str = DEFAULT_PACKER,
    num_packings: int = 1,
) -> RowPlan:
    """Make or read the row plan of a store.

    Args:
        store: The samples.
        row_tokens: Tokens of a row (Megatron's ``--seq-length``).
        align_tokens: Multiple of every document's length (see ``cp_layout.alignment``).
        seed: Which of equally long samples goes where.
        cache: Folder for the plan; the store's own ``row_plans`` when not given.
        draw: What a mixture drew from the store; every sample once when not given.
        packer: A name of ``PACKERS``.
        num_packings: Epochs until the rows of the first come again.

    Raises:
        PlanError: Rows do not divide by the alignment, or no sample fits.
    """
    if row_tokens % align_tokens:
        raise PlanError(
            f"rows of {row_tokens} tokens are not a multiple of the alignment {align_tokens}; "
            f"set --seq-length to {row_tokens - row_tokens % align_tokens} or "
            f"{row_tokens + align_tokens - row_tokens % align_tokens}"
        )
    if not len(store):
        raise PlanError(f"{store.name} holds no samples")
    lengths = store.tokens.lengths.astype(np.int64)
    drawn = [np.arange(len(store))] if draw is None else [stage.samples for stage in draw.stages]
    fits = -(-lengths // align_tokens) * align_tokens <= row_tokens
    kept = [samples[fits[samples]] for samples in drawn]
    if not any(map(len, kept)):
        shortest = min(int(lengths[samples].min()) for samples in drawn)
        raise PlanError(
            f"none of the {sum(map(len, drawn)):,} samples of {store.name} fits a row of "
            f"{row_tokens} tokens (the shortest has {shortest}); raise --seq-length"
        )
    folder = cache or store.path / "row_plans"
    identity = _identity(store, row_tokens, align_tokens, seed, draw, packer)
    if num_packings > 1:
        identity += f", {num_packings} packings"
    cached = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    planned = _read(cached, num_samples=num_packings * sum(map(len, kept)))
    warnings: tuple[str, ...] = ()
    if planned is None:
        planned = _pack(
            PACKERS[packer],
            *(kept, lengths),
            row_tokens=row_tokens,
            align_tokens=align_tokens,
            seeds=[seed, *([seed, number] for number in range(1, num_packings))],
        )
        warnings = _write(cached, *planned)
    rows, stages = planned
    counts = _turns_and_labels(store)
    contents = _contents(store, rows, *counts)
    too_long = np.unique(np.concatenate([samples[~fits[samples]] for samples in drawn]))
    return RowPlan(
        rows,
        row_tokens,
        align_tokens,
        **contents,
        unit_weights=_unit_weights(store, rows, *counts)
        if store.has_weights
        else {objective: contents[name].astype(float) for objective, name in UNITS.items()},
        squares=_squares(lengths, rows, row_tokens=row_tokens, align_tokens=align_tokens),
        too_long=too_long,
        identity=identity,
        stages=stages,
        num_packings=num_packings,
        warnings=warnings,
    )


def _contents(
    store: TokenStore, rows: Rows, turns: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int64]]:
    """Count what each row holds.

    Args:
        store: Whose samples the rows are made of.
        rows: They.
        turns: int64 [S]. Turns of each sample.
        labels: int64 [S]. Label tokens of each sample.
    """
    of_samples = {
        "turns": turns,
        "labelled_samples": (turns > 0).astype(np.int64),
        "labels": labels,
        "tokens": store.tokens.lengths.astype(np.int64),
    }
    return {name: _of_rows(rows, values) for name, values in of_samples.items()}


def _of_rows[T: (np.int64, np.float64)](rows: Rows, of_samples: npt.NDArray[T]) -> npt.NDArray[T]:
    """Sum what samples have over each row, a sample that is there twice two times."""
    return np.add.reduceat(of_samples[rows.samples], rows.borders[:-1])


def _unit_weights(
    store: TokenStore, rows: Rows, turns: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Sum the weights of each row's units; arguments as of ``_contents``."""
    records = store.turns.values.reshape(-1, len(TURN_FIELDS))
    weights = turn_weights_of(records).astype(np.float64)
    of_labels = weights * records[:, TURN_FIELDS.index("num_tokens")]
    sample = np.repeat(np.arange(len(store)), turns)
    by_turn, by_label = (
        np.bincount(sample, weights=values, minlength=len(store)) for values in (weights, of_labels)
    )
    of_samples = {"turn": by_turn, "sample": by_label / labels.clip(min=1), "token": by_label}
    return {name: _of_rows(rows, values) for name, values in of_samples.items()}


def _squares(
    lengths: npt.NDArray[np.int64], rows: Rows, *, row_tokens: int, align_tokens: int
) -> npt.NDArray[np.int64]:
    """Sum the squared documents of each row; what a row lacks is a document, too."""
    padded = -(-lengths[rows.samples] // align_tokens) * align_tokens
    gaps = row_tokens - np.add.reduceat(padded, rows.borders[:-1])
    squares: npt.NDArray[np.int64] = np.add.reduceat(padded**2, rows.borders[:-1]) + gaps**2
    return squares


def _pack(
    packer: Packer,
    stages: Sequence[npt.NDArray[np.int64]],
    lengths: npt.NDArray[np.int64],
    *,
    row_tokens: int,
    align_tokens: int,
    seeds: Sequence[Seed],
) -> tuple[Rows, tuple[int, ...]]:
    """Pack each stage by itself, once with each seed; return all rows, and the stages' borders."""
    packings = [(samples, seed) for seed in seeds for samples in stages]
    made = [
        packer(lengths[samples], row_tokens=row_tokens, align_tokens=align_tokens, seed=seed)
        for samples, seed in packings
    ]
    # A row's place among all samples: its place in its stage, behind those of earlier stages.
    first = np.cumsum([0, *(len(samples) for samples, _ in packings)])
    borders = [rows.borders[1:] + start for rows, start in zip(made, first[:-1], strict=True)]
    rows = Rows(
        np.concatenate(
            [all_[rows.samples] for (all_, _), rows in zip(packings, made, strict=True)]
        ),
        np.concatenate([np.zeros(1, np.int64), *borders]),
    )
    return rows, tuple(np.cumsum([0, *map(len, made)]).tolist())


def _turns_and_labels(store: TokenStore) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count supervised turns and label tokens of each sample, from the turn records."""
    width = len(TURN_FIELDS)
    per_turn = store.turns.values.reshape(-1, width)[:, TURN_FIELDS.index("num_tokens")]
    turn_borders = store.turns.offsets // width
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_turn, dtype=np.int64)])
    return np.diff(turn_borders), np.diff(running[turn_borders])


def _identity(
    store: TokenStore,
    row_tokens: int,
    align_tokens: int,
    seed: int,
    draw: Draw | None,
    packer: str,
) -> str:
    every_sample_once = (
        f"plan version {PLAN_VERSION}, {packer}, store {store.fingerprint}, {len(store)} samples, "
        f"row_tokens {row_tokens}, align_tokens {align_tokens}, seed {seed}"
    )
    return every_sample_once if draw is None else f"{every_sample_once}, {draw.identity}"


def _read(path: Path, *, num_samples: int) -> tuple[Rows, tuple[int, ...]] | None:
    try:
        with np.load(path) as saved:
            rows = Rows(saved["samples"], saved["borders"])
            one_stage = [0, len(rows)]
            stages = saved["stages"].tolist() if "stages" in saved else one_stage
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # absent or cut short: it is made again
    is_whole = len(rows.samples) == num_samples == rows.borders[-1] and stages[-1] == len(rows)
    return (rows, tuple(stages)) if is_whole else None


def _write(path: Path, rows: Rows, stages: tuple[int, ...]) -> tuple[str, ...]:
    """Write to a name of this process and rename: ranks may race, readers see whole files.

    Returns:
        A warning where that is not possible.
    """
    temporary = path.with_name(f"{path.stem}.{os.uname().nodename}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, samples=rows.samples, borders=rows.borders, stages=np.array(stages))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        return (f"row plan not cached ({error}); it will be computed again next time",)
    return ()
