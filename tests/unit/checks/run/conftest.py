"""A converted model, its tokenizer and stores, for tests that ask the rules of a whole run."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasft.schema import Sample
from megasft.store import META, StoreWriter
from tests.stores import random_samples
from tests.tiny_tokenizer import make_tokenizer

VOCAB = 512
MODEL_FLAGS = {
    "--num-layers": "4",
    "--hidden-size": "96",
    "--ffn-hidden-size": "192",
    "--num-attention-heads": "6",
    "--kv-channels": "16",
    "--max-position-embeddings": "4096",
    "--padded-vocab-size": str(VOCAB),
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
}


def write_store(output: Path, samples: list[Sample], tokenizer: Path, **changes: Any) -> Path:
    """Write a store as a build does, in the facts that are compared."""
    sha256 = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    facts = {"path": str(tokenizer), "sha256": sha256, "chat_template_sha256": "0" * 64}
    special = {"bos": None, "eos": 2, "pad": 0, "end_of_turn": [2]}
    with StoreWriter(output, vocab_size=VOCAB) as writer:
        for i, sample in enumerate(samples):
            writer.add(sample, source=0, line=i + 1)
        writer.finish(
            {
                "tokenizer": facts | changes,
                "special_tokens": special,
                "categories": {},
                "counts": {},
                "sources": [{"path": "made.jsonl"}],
            }
        )
    return output


def with_two_ids_swapped(tokenizer: Path, folder: Path) -> Path:
    """Copy a tokenizer; two tokens of its vocabulary change ids, and nothing else changes."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, i in vocabulary.items() if i in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def convert(folder: Path, tokenizer: Path) -> Path:
    """Write what of a converted checkpoint preflight reads: the flags, and the tokenizer."""
    (folder / "hf").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "hf" / name).write_bytes((tokenizer / name).read_bytes())
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [2]}')
    flags = [text for pair in MODEL_FLAGS.items() for text in pair]
    switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    model = {"flags": flags + switches, "hf_config": {"max_position_embeddings": 4096}}
    (folder / "megasft_model.json").write_text(json.dumps(model))
    return folder


class World(SimpleNamespace):
    """A run that starts, and what makes it one that does not."""

    def __init__(self, folder: Path) -> None:
        samples = random_samples(200, seed=5, vocab=VOCAB)
        self.folder = folder
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        self.other_tokenizer = with_two_ids_swapped(self.tokenizer, folder / "other-tokenizer")
        self.model = convert(folder / "megatron", self.tokenizer)
        self.store = write_store(folder / "store", samples, self.tokenizer)
        self.valid = write_store(folder / "valid", samples[:40], self.tokenizer)
        others = random_samples(50, seed=6, vocab=VOCAB)
        self.other = write_store(folder / "other", others, self.other_tokenizer)
        self.newer = write_store(folder / "newer", samples[:5], self.tokenizer)
        meta = json.loads((self.newer / META).read_text())
        (self.newer / META).write_text(json.dumps(meta | {"format_version": 99}))
        (folder / "half.partial").mkdir()
        self.half = folder / "half"

    def flags(self, **changes: object) -> list[str]:
        """Flags of a run that starts, some changed; None drops one, "" is a switch."""
        good: dict[str, object] = {
            "megasft_data": self.store,
            "megasft_valid_data": self.valid,
            "megasft_hf": self.model,
            "calculate_per_token_loss": "",
            "seq_length": 96,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "train_iters": 30,
            "lr": 1e-3,
            "save": self.folder / "run",
            "save_interval": 10,
        }
        given = [(k, v) for k, v in (good | changes).items() if v is not None]
        flags = [("--" + k.replace("_", "-"), str(v)) for k, v in given]
        return [text for pair in flags for text in pair if text]


@pytest.fixture(scope="session")
def run_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("preflight"))
