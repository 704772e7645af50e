"""What every run of a proof starts from: a token store, a small model and its checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.hf_to_megatron import convert
from megasft.packing.balance import BatchShape, DealtOrder
from megasft.packing.forecast_cost import read_cost
from megasft.packing.plan import RowPlan, plan_rows
from megasft.proof import families
from megasft.proof.float64 import widen
from megasft.proof.oracle import Adam, Truth, first_step, router_losses
from megasft.proof.samples import random_samples, weighted, write_store
from megasft.ranks.layout import Layout
from megasft.schema import Sample
from megasft.store import TokenStore

ROW_TOKENS: Final = 96
BATCH: Final = 8
ALIGN: Final = 8
SEED: Final = 11
NUM_SAMPLES: Final = 120
ADAM: Final = Adam(lr=1e-3, clip_grad=1.0, weight_decay=0.1, eps=1e-5)


AUX_COEFF: Final = 0.05
Z_COEFF: Final = 0.01


class Objective(NamedTuple):
    """What a run optimizes, and how the table calls it.

    Attributes:
        turn_weights: What becomes of random weights of turns; empty for data without.
        steps: That a run makes. The first is compared with the truth; that another follows is to
            be seen of each layout once.
    """

    label: str
    name: str
    dft_alpha: float = 0.0
    has_side_losses: bool = False
    turn_weights: str = ""
    steps: int = 1

    @property
    def flags(self) -> list[str]:
        """Our flags, and Megatron's for side losses."""
        flags = ["--megasft-loss", self.name, "--megasft-dft-alpha", str(self.dft_alpha)]
        if self.turn_weights:
            flags += ["--megasft-turn-weights", self.turn_weights]
        if self.has_side_losses:
            flags += ["--moe-router-load-balancing-type", "aux_loss"]
            flags += ["--moe-aux-loss-coeff", str(AUX_COEFF), "--moe-z-loss-coeff", str(Z_COEFF)]
        return flags


OBJECTIVES: Final = {
    "turn": Objective("turn", "turn", steps=2),
    "sample": Objective("sample", "sample"),
    "token": Objective("token", "token"),
    "dft": Objective("turn, DFT 0.8", "turn", dft_alpha=0.8),
    "router": Objective("turn + router losses", "turn", has_side_losses=True),
    "weights": Objective("turn, weights, DFT", "turn", dft_alpha=0.8, turn_weights="use"),
    "normalized": Objective(
        "sample, normalized",
        "sample",
        has_side_losses=True,
        turn_weights="normalize",
    ),
}
"""``megasft prove --loss NAME``."""


MicroBatches = tuple[tuple[int, ...], ...]
"""Rows of the plan that are trained together, for each micro-batch of a global batch."""

HF: Final = "hf"
"""Folder of a family's Hugging Face model."""


@dataclass(frozen=True, slots=True)
class World:
    """A family's model, as Hugging Face has it and as Megatron loads it.

    Attributes:
        folder: Holds ``store``, ``FAMILY/hf``, ``FAMILY/megatron`` and what runs record.
        family: A name of ``families.FAMILIES``.
        hf: The Hugging Face model, float64.
        model: What conversion knows of it.
        batch: Rows of a global batch.
        weighted: The same samples with random weights of turns.
    """

    folder: Path
    family: str
    store: TokenStore
    hf: Any
    model: Model
    batch: int = BATCH
    weighted: TokenStore | None = None

    @property
    def plan(self) -> RowPlan:
        """The rows every layout trains."""
        return plan_rows(self.store, row_tokens=ROW_TOKENS, align_tokens=ALIGN, seed=SEED)

    def micro_batches(self, *, dp_size: int = 1, mbs: int = 1) -> MicroBatches:
        """Return the rows of the first global batch, grouped as they are trained together.

        Args:
            dp_size: Data-parallel ranks. Megatron's sampler gives each in turn the next ``mbs``
                positions of the run.
            mbs: Rows of a micro-batch.

        Returns:
            Rows of the plan, ascending: which they are is all that matters to the truth.
        """
        plan, shape = self.plan, BatchShape(self.batch, dp_size, mbs)
        costs = read_cost(self.folder / self.family / HF).of(plan.row_tokens, plan.squares)
        order = DealtOrder(plan.order(seed=SEED), costs, shape)
        starts = range(0, self.batch, mbs)
        return tuple(sorted(tuple(sorted(order[i + k] for k in range(mbs))) for i in starts))

    def samples(self, rows: Iterable[int]) -> list[list[Sample]]:
        """Return the samples of each of these rows of the plan."""
        samples_of = self.plan.rows
        return [[self.store.sample(int(i)) for i in samples_of[row]] for row in rows]

    def truth(self, objective: Objective, micro_batches: MicroBatches | None = None) -> Truth:
        """Compute what the first step must give.

        Args:
            objective: What is optimized.
            micro_batches: Which rows are trained together, if not each alone; nothing but a
                router's losses depends on that.
        """
        micro_batches = micro_batches or self.micro_batches()
        of_store = replace(self, store=self._store_of(objective))
        side_loss = None
        if objective.has_side_losses:
            groups = [
                list(chain(*map(padded_documents, self.samples(rows)))) for rows in micro_batches
            ]
            side_loss = partial(
                router_losses, self.hf, groups, aux_coeff=AUX_COEFF, z_coeff=Z_COEFF
            )
        return first_step(
            self.hf,
            chain(*of_store.samples(chain(*micro_batches))),
            objective=objective.name,
            adam=ADAM,
            dft_alpha=objective.dft_alpha,
            turn_weights=objective.turn_weights or "ignore",
            side_loss=side_loss,
        )

    def _store_of(self, objective: Objective) -> TokenStore:
        """Return the store with weights for an objective that has some; rows are the same."""
        if not objective.turn_weights:
            return self.store
        assert self.weighted is not None, "a world of random weights"
        return self.weighted

    def flags(self, layout: Layout, objective: Objective) -> list[str]:
        """Return the training entry point's flags of one run."""
        sizes = {
            "--megasft-data": self._store_of(objective).path,
            "--megasft-hf": self.folder / self.family / "megatron",
            "--megasft-align-tokens": ALIGN,
            "--seq-length": ROW_TOKENS,
            "--global-batch-size": self.batch,
            "--seed": SEED,
            "--train-iters": objective.steps,
            "--log-interval": 1000,
        }
        flags = [str(text) for pair in sizes.items() for text in pair]
        split = layout.flags(num_layers=self.model.num_layers)
        return [*flags, "--calculate-per-token-loss", *ADAM.flags, *objective.flags, *split]


def padded_documents(row: list[Sample], *, pad_token: int = 0) -> list[list[int]]:
    """Return the documents of a row as they are trained: padded, and the tail as one of its own."""
    documents = [one.tokens.tolist() + [pad_token] * (-len(one.tokens) % ALIGN) for one in row]
    tail = ROW_TOKENS - sum(map(len, documents))
    return [*documents, [pad_token] * tail] if tail else documents


def make_world(folder: Path, family: str) -> World:
    """Write the store, the model and its checkpoint; what is there already is written anew."""
    samples = random_samples(NUM_SAMPLES, row_tokens=ROW_TOKENS, seed=SEED)
    store = write_store(folder / "store", samples)
    with_weights = write_store(folder / "weighted", weighted(samples, seed=SEED))
    hf_folder = folder / family / HF
    hf = families.build(family, seed=0)
    hf.save_pretrained(hf_folder)
    convert(hf_folder, folder / family / "megatron", overwrite=True)
    return World(folder, family, store, widen(hf), read_model(hf_folder), weighted=with_weights)
