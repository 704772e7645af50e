"""The row plan: which samples make which row, what an epoch holds, and its cache beside the store.

A plan is computed from lengths alone, so sequence length, context parallelism and seed change
without tokenizing again. It is cheap (see ``pack.py``), so every rank may compute it: nothing is
broadcast and nobody waits for rank 0. The cache file carries the key of everything the plan depends
on (store fingerprint, sizes, seed); a file made for anything else is not read but made again.
"""

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from megasft.errors import PlanError
from megasft.packing.pack import Rows, best_fit
from megasft.schema import TURN_FIELDS
from megasft.store import TokenStore

logger = logging.getLogger(__name__)

PLAN_VERSION: Final = 1


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
        too_long: int64. Samples that fit no row and are left out.
        identity: Everything the rows depend on, readable; a run resumes on no other plan.
    """

    rows: Rows
    row_tokens: int
    align_tokens: int
    turns: npt.NDArray[np.int64]
    labelled_samples: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    too_long: npt.NDArray[np.int64]
    identity: str

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self, *, global_batch_size: int) -> str:
        """Return one line with what an epoch holds, in rows, turns, tokens and iterations."""
        total = len(self) * self.row_tokens
        padding = 100 * (1 - int(self.tokens.sum()) / total)
        return (
            f"{len(self):,} rows of {self.row_tokens:,} tokens ({padding:.2f} % padding), "
            f"{len(self.rows.samples):,} samples, {int(self.turns.sum()):,} turns, "
            f"{int(self.tokens.sum()):,} tokens, {int(self.labels.sum()):,} of them labels; "
            f"an epoch is {len(self) / global_batch_size:,.2f} iterations of "
            f"{global_batch_size:,} rows"
        )


def plan_rows(
    store: TokenStore, *, row_tokens: int, align_tokens: int, seed: int, cache: Path | None = None
) -> RowPlan:
    """Make or read the row plan of a store.

    Args:
        store: The samples.
        row_tokens: Tokens of a row (Megatron's ``--seq-length``).
        align_tokens: Multiple of every document's length (see ``cp_layout.alignment``).
        seed: Which of equally long samples goes where.
        cache: Folder for the plan; the store's own ``row_plans`` when not given.

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
        raise PlanError(f"{store.path} holds no samples")
    lengths = store.tokens.lengths.astype(np.int64)
    padded = -(-lengths // align_tokens) * align_tokens
    fits = padded <= row_tokens
    if not fits.any():
        raise PlanError(
            f"none of the {len(store):,} samples of {store.path} fits a row of {row_tokens} "
            f"tokens (the shortest has {int(lengths.min())}); raise --seq-length"
        )
    kept = np.flatnonzero(fits)
    folder = cache or store.path / "row_plans"
    identity = _identity(store, row_tokens, align_tokens, seed)
    cached = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    rows = _read(cached, num_samples=len(kept))
    if rows is None:
        packed = best_fit(
            lengths[kept], row_tokens=row_tokens, align_tokens=align_tokens, seed=seed
        )
        rows = Rows(kept[packed.samples], packed.borders)
        _write(cached, rows)
    turns, labels = _turns_and_labels(store)
    has_turn = (turns > 0).astype(np.int64)
    of_rows = {
        name: np.add.reduceat(values[rows.samples], rows.borders[:-1])
        for name, values in (
            *(("turns", turns), ("labelled_samples", has_turn)),
            *(("labels", labels), ("tokens", lengths)),
        )
    }
    too_long = np.flatnonzero(~fits)
    return RowPlan(rows, row_tokens, align_tokens, **of_rows, too_long=too_long, identity=identity)


def _turns_and_labels(store: TokenStore) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count supervised turns and label tokens of each sample, from the turn records."""
    width = len(TURN_FIELDS)
    per_turn = store.turns.values.reshape(-1, width)[:, TURN_FIELDS.index("num_tokens")]
    turn_borders = store.turns.offsets // width
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_turn, dtype=np.int64)])
    return np.diff(turn_borders), np.diff(running[turn_borders])


def _identity(store: TokenStore, row_tokens: int, align_tokens: int, seed: int) -> str:
    return (
        f"plan version {PLAN_VERSION}, best_fit, store {store.fingerprint}, {len(store)} samples, "
        f"row_tokens {row_tokens}, align_tokens {align_tokens}, seed {seed}"
    )


def _read(path: Path, *, num_samples: int) -> Rows | None:
    try:
        with np.load(path) as saved:
            rows = Rows(saved["samples"], saved["borders"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # absent or cut short: it is made again
    return rows if len(rows.samples) == num_samples == rows.borders[-1] else None


def _write(path: Path, rows: Rows) -> None:
    """Write to a name of this process and rename: ranks may race, readers see whole files."""
    temporary = path.with_name(f"{path.stem}.{os.uname().nodename}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, samples=rows.samples, borders=rows.borders)
        temporary.replace(path)
    except OSError as error:
        logger.warning("row plan not cached (%s); it will be computed again next time", error)
        with suppress(OSError):
            temporary.unlink()
