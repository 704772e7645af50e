import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from .conftest import Seen

Megasft = Callable[..., Seen]


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path, megasft: Megasft) -> Path:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[b]Yo[/b]"}]
    meta = {"category_name": "chat"}
    lines = [{"messages": messages, "meta": meta}, {"messages": [*messages, *messages]}]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    output = tmp_path / "store"
    assert megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", output).code == 0
    return output


def test_counts_categories_lengths_and_a_conversation_are_shown(
    store: Path, megasft: Megasft
) -> None:
    seen = megasft("inspect", store, "--sample", 1, "--width", 100)
    assert seen.code == 0
    text = re.sub(" +", " ", seen.out)
    assert " samples 2 of 2 conversations" in text
    assert " turns 3" in text
    assert " 1 chat 1 turns" in text
    assert " 0 (none) 2 turns" in text
    assert re.search(r" 32 - 63 1 █", text)
    assert f"sample 1 ({store.parent / 'chats.jsonl'}:2)" in text
    assert text.count("⟦[b]Yo[/b]<|im_end|>⟧") == 2  # the text is no console markup
    assert "⟦trained⟧, the rest is context" in text


def test_a_moved_tokenizer_can_be_named(store: Path, tokenizer_dir: Path, megasft: Megasft) -> None:
    file = store / "store.json"
    meta = orjson.loads(file.read_bytes())
    meta["tokenizer"]["path"] = "/moved"
    file.write_bytes(orjson.dumps(meta))
    seen = megasft("inspect", store)
    assert seen.code == 1
    assert "say where with --tokenizer" in seen.err
    assert megasft("inspect", store, "--tokenizer", tokenizer_dir).code == 0


def test_a_sample_that_is_not_there_is_refused(store: Path, megasft: Megasft) -> None:
    seen = megasft("inspect", store, "--sample", 2)
    assert seen.code == 1
    assert "has samples 0 to 1" in seen.err


def test_a_page_is_written_beside_what_is_printed(
    store: Path, tmp_path: Path, megasft: Megasft
) -> None:
    printed = megasft("inspect", store).out
    file = tmp_path / "page.html"
    seen = megasft("inspect", store, "--html", file)
    assert seen.code == 0
    assert seen.out.startswith(printed)
    assert f"page: {file} (" in seen.out
    assert "2 of 2 samples)" in seen.out
    assert "[b]Yo[/b]" in file.read_text()
    megasft("inspect", store, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == file.read_bytes()


def test_a_page_that_cannot_be_written_is_refused(store: Path, megasft: Megasft) -> None:
    seen = megasft("inspect", store, "--html", store / "no" / "page.html")
    assert seen.code == 1
    assert "cannot be written (No such file or directory)" in seen.err
