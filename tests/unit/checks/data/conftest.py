"""Fixtures of lint's tests, which are those of the data stage."""

from tests.unit.data.conftest import calls_dir, calls_tokenizer, tokenizer_dir, write_jsonl

__all__ = ["calls_dir", "calls_tokenizer", "tokenizer_dir", "write_jsonl"]
