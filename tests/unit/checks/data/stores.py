"""Stores and files small enough to check by eye, and what lint finds in them."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megasft.checks.data.run import LintOptions, lint_files, lint_store
from megasft.checks.engine import Finding, Report
from megasft.data.build import BuildOptions, build
from megasft.data.tokenize import Recipe
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store

PAD, START, STOP = 0, 1, 2
"""Ids of the tiny tokenizer's <|endoftext|>, <|im_start|> and <|im_end|>."""
SPECIAL = {"bos": None, "eos": STOP, "pad": PAD, "end_of_turn": [STOP]}

Given = tuple[list[int], list[tuple[int, int]]]  # token ids; start and number of each turn


def made(path: Path, *samples: Given, vocab_size: int = 512, **meta: Any) -> TokenStore:
    """A store of these samples; sample ``i`` is from line ``i + 1`` of chats.jsonl."""
    facts: dict[str, Any] = {
        "special_tokens": SPECIAL,
        "counts": {},
        "sources": [{"path": "chats.jsonl"}],
        "categories": {},
    }
    with StoreWriter(path, vocab_size=vocab_size) as writer:
        for line, (tokens, turns) in enumerate(samples, start=1):
            records = turn_records([(*turn, 0, 1) for turn in turns])
            writer.add(Sample(np.array(tokens, np.int32), records), source=0, line=line)
        writer.finish(facts | meta)
    return open_store(path)


def found(report: Report) -> dict[str, Finding]:
    """The findings by rule."""
    return {finding.rule: finding for finding in report.findings}


def lint(store: TokenStore, **options: Any) -> dict[str, Finding]:
    return found(lint_store(store, LintOptions(**options)))


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, **fields}


def lint_records(folder: Path, tokenizer: Path, *records: Any) -> dict[str, Finding]:
    """What is found in a file of these records."""
    file = write(folder / "chats.jsonl", *records)
    return found(lint_files((file,), LintOptions(tokenizer)))


def built(folder: Path, tokenizer: Path, *records: Any) -> TokenStore:
    """The store that ``megasft build`` makes of these records."""
    file = write(folder / "chats.jsonl", *records)
    options = BuildOptions((file,), folder / "store", Recipe(tokenizer), skip_bad=True)
    build(options, on_bytes=lambda n: None, on_rejected=lambda place, message: None)
    return open_store(folder / "store")


def rewritten(store: TokenStore, folder: Path, *, turns: list[list[list[int]]]) -> TokenStore:
    """The same store with other turn records, as a wrong program would have written them."""
    with StoreWriter(folder, vocab_size=store.meta["vocab_size"]) as writer:
        for index, records in enumerate(turns):
            source, line = (int(x) for x in store.lineage[index])
            sample = Sample(store.sample(index).tokens, np.array(records, np.int32).reshape(-1, 5))
            writer.add(sample, source=source, line=line)
        writer.finish({k: v for k, v in store.meta.items() if k != "fingerprint"})
    return open_store(folder)
