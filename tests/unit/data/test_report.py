from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from megasft.data.build import BuildOptions, build
from megasft.data.report import (
    Bin,
    CategoryRow,
    Piece,
    category_rows,
    facts,
    length_histogram,
    pieces,
)
from megasft.data.tokenize import Recipe
from megasft.data.too_long import Limit
from megasft.store import open_store


def test_bins_are_powers_of_two_and_hold_every_sample() -> None:
    lengths = np.array([1, 4, 7, 8, 40], np.int32)
    assert length_histogram(lengths) == [
        Bin(1, 2, 1), Bin(2, 4, 0), Bin(4, 8, 2), Bin(8, 16, 1), Bin(16, 32, 0), Bin(32, 64, 1),
    ]  # fmt: skip
    assert length_histogram(np.zeros(0, np.int32)) == []


def test_pieces_show_what_is_trained(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "assistant", "content": "😀"},
    ]
    path = write_jsonl({"messages": messages, "meta": {"category_name": "chat"}})
    options = BuildOptions((path,), tmp_path / "store", Recipe(tokenizer_dir))
    build(options, on_bytes=lambda n: None, on_rejected=lambda p, m: None)
    store = open_store(tmp_path / "store")
    assert pieces(store, 0, AutoTokenizer.from_pretrained(tokenizer_dir)) == [
        Piece("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", trained=False),
        Piece("Hello<|im_end|>", trained=True),
        Piece("\n<|im_start|>assistant\n", trained=False),
        Piece("😀<|im_end|>", trained=True),
        Piece("\n", trained=False),
    ]
    num_labels = int(store.sample(0).turns[:, 1].sum())
    assert category_rows(store) == [CategoryRow(1, "chat", 2, num_labels)]


def test_what_was_lost_to_length_is_among_the_facts(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> None:
    def chat(answer: str) -> dict[str, object]:
        question = {"role": "user", "content": "Hi"}
        return {"messages": [question, {"role": "assistant", "content": answer}]}

    path = write_jsonl(chat("Hello"), chat("Hello " * 40))
    recipe = Recipe(tokenizer_dir, limit=Limit(30))
    options = BuildOptions((path,), tmp_path / "store", recipe)
    tally = build(options, on_bytes=lambda n: None, on_rejected=lambda p, m: None)
    said = dict(facts(open_store(tmp_path / "store")))
    assert said["too long"].startswith(f"0 cut, 1 dropped; lost {tally.lost_tokens:,} tokens (")
    assert f"{tally.lost_labels:,} of them trained" in said["too long"]
