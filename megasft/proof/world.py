"""What every run of a proof starts from: a token store, a small model and its checkpoint."""

from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.hf_to_megatron import convert
from megasft.packing.order import RowOrder
from megasft.packing.plan import RowPlan, plan_rows
from megasft.proof import families
from megasft.proof.float64 import widen
from megasft.proof.layouts import Layout
from megasft.proof.oracle import Adam, Truth, first_step, router_losses
from megasft.proof.samples import random_samples, write_store
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
    """What a run optimizes, and how the table calls it."""

    label: str
    name: str
    dft_alpha: float = 0.0
    has_side_losses: bool = False

    @property
    def flags(self) -> list[str]:
        """Our flags, and Megatron's for side losses."""
        flags = ["--megasft-loss", self.name, "--megasft-dft-alpha", str(self.dft_alpha)]
        if self.has_side_losses:
            flags += ["--moe-router-load-balancing-type", "aux_loss"]
            flags += ["--moe-aux-loss-coeff", str(AUX_COEFF), "--moe-z-loss-coeff", str(Z_COEFF)]
        return flags


OBJECTIVES: Final = {
    "turn": Objective("turn", "turn"),
    "sample": Objective("sample", "sample"),
    "token": Objective("token", "token"),
    "dft": Objective("turn, DFT 0.8", "turn", dft_alpha=0.8),
    "router": Objective("turn + router losses", "turn", has_side_losses=True),
}
"""``megasft prove --loss NAME``."""


@dataclass(frozen=True, slots=True)
class World:
    """A family's model, as Hugging Face has it and as Megatron loads it.

    Attributes:
        folder: Holds ``store``, ``FAMILY/hf``, ``FAMILY/megatron`` and what runs record.
        family: A name of ``families.FAMILIES``.
        hf: The Hugging Face model, float64.
        model: What conversion knows of it.
        batch: Rows of a global batch.
    """

    folder: Path
    family: str
    store: TokenStore
    hf: Any
    model: Model
    batch: int = BATCH

    @property
    def plan(self) -> RowPlan:
        """The rows every layout trains."""
        return plan_rows(self.store, row_tokens=ROW_TOKENS, align_tokens=ALIGN, seed=SEED)

    def first_rows(self) -> list[list[Sample]]:
        """Return the samples of the first global batch, row by row."""
        plan = self.plan
        order = RowOrder(num_rows=len(plan), seed=SEED)
        return [[self.store.sample(int(i)) for i in plan.rows[order[k]]] for k in range(self.batch)]

    def truth(self, objective: Objective, *, mbs: int = 1) -> Truth:
        """Compute what the first step must give.

        Args:
            objective: What is optimized.
            mbs: Rows of a micro-batch; balancing experts is a matter of a micro-batch.
        """
        rows = self.first_rows()
        side_loss = None
        if objective.has_side_losses:
            padded = [padded_documents(row) for row in rows]
            groups = [list(chain(*padded[i : i + mbs])) for i in range(0, self.batch, mbs)]
            side_loss = partial(
                router_losses, self.hf, groups, aux_coeff=AUX_COEFF, z_coeff=Z_COEFF
            )
        return first_step(
            self.hf,
            [sample for row in rows for sample in row],
            objective=objective.name,
            adam=ADAM,
            dft_alpha=objective.dft_alpha,
            side_loss=side_loss,
        )

    def flags(self, layout: Layout, objective: Objective) -> list[str]:
        """Return the training entry point's flags of one run."""
        sizes = {
            "--megasft-data": self.store.path,
            "--megasft-hf": self.folder / self.family / "megatron",
            "--megasft-align-tokens": ALIGN,
            "--seq-length": ROW_TOKENS,
            "--global-batch-size": self.batch,
            "--seed": SEED,
            "--train-iters": 2,
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
    store = write_store(
        folder / "store", random_samples(NUM_SAMPLES, row_tokens=ROW_TOKENS, seed=SEED)
    )
    hf_folder = folder / family / "hf"
    hf = families.build(family, seed=0)
    hf.save_pretrained(hf_folder)
    convert(hf_folder, folder / family / "megatron", overwrite=True)
    return World(folder, family, store, widen(hf), read_model(hf_folder))
