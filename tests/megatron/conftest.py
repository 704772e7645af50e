"""A store, a tiny Hugging Face model and its Megatron checkpoint, shared by the training tests."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from megasft.packing.order import RowOrder
from megasft.packing.plan import plan_rows
from megasft.proof.float64 import widen
from megasft.proof.oracle import Truth, first_step
from megasft.proof.world import ADAM
from megasft.schema import Sample
from megasft.store import TokenStore
from tests.stores import random_samples, write_store

ROW_TOKENS, BATCH, SEED, VOCAB = 96, 8, 11, 256


class World(SimpleNamespace):
    """What every run of these tests starts from."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from checkpoint_convert.hf_to_megatron import convert

        self.folder = folder
        self.store = write_store(folder / "store", random_samples(150, seed=5, vocab=VOCAB))
        # Rows for several evaluation batches, the last one not full; and no more, since most runs
        # evaluate twice.
        self.valid_samples = random_samples(40, seed=6, vocab=VOCAB)
        self.valid = write_store(folder / "valid", self.valid_samples)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        ends = {"tie_word_embeddings": False, "vocab_size": VOCAB, "max_position_embeddings": 512}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ends, initializer_range=0.2))
        model.save_pretrained(folder / "hf")
        convert(folder / "hf", folder / "megatron")
        self.model = widen(model)

    def first_batch(self, store: TokenStore | None = None) -> list[Sample]:
        store = store or self.store
        plan = plan_rows(store, row_tokens=ROW_TOKENS, align_tokens=8, seed=SEED)
        order = RowOrder(num_rows=len(plan), seed=SEED)
        rows = [plan.rows[order[k]] for k in range(BATCH)]
        return [store.sample(int(i)) for row in rows for i in row]

    def oracle(
        self,
        objective: str,
        *,
        samples: Sequence[Sample] | None = None,
        dft_alpha: float = 0.0,
        turn_weights: str = "use",
    ) -> Truth:
        """What the first step, or a pass over these samples, must give."""
        return first_step(
            self.model,
            self.first_batch() if samples is None else samples,
            objective=objective,
            dft_alpha=dft_alpha,
            turn_weights=turn_weights,
            adam=ADAM,
        )

    def flags(self, name: str, *more: object) -> list[str]:
        """Flags of a run that logs to ``folder / name``; later ones win."""
        paths = ("--megasft-data", self.store.path, "--megasft-valid-data", self.valid.path)
        model = ("--megasft-hf", self.folder / "megatron", "--calculate-per-token-loss")
        sizes = ("--seq-length", ROW_TOKENS, "--global-batch-size", BATCH, "--seed", SEED)
        steps = ("--train-iters", 1, "--lr", 1e-3, "--clip-grad", 1.0, "--eval-interval", 1)
        board = ("--tensorboard-dir", self.folder / name, "--tensorboard-log-interval", 1)
        log = ("--log-interval", 1, "--micro-batch-size", 1)
        return [str(f) for f in (*paths, *model, *sizes, *steps, *board, *log, *more)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))
