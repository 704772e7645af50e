"""The page of a store: its numbers, its escaping, and what a browser makes of it.

The browser tests want a Chromium; without one they are skipped with that reason.
"""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from transformers import AutoTokenizer

from megasft.data.build import BuildOptions, build
from megasft.data.page import page
from megasft.data.tokenize import Recipe
from megasft.data.too_long import Limit
from megasft.schema import Sample, turn_records
from megasft.store import StoreWriter, TokenStore, open_store

EVIL = "</script></div><b>bold</b>&amp;<script>console.error('ran')</script>"
TRAINED_COLOUR = (0xA7, 0xE8, 0xBD)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
Build = Callable[..., TokenStore]


def chat(*turns: tuple[str, str], category: str | None = None) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages} | ({"meta": {"category_name": category}} if category else {})


@pytest.fixture
def built(tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]) -> Build:
    def make(*records: Any, name: str = "store", max_tokens: int = 0) -> TokenStore:
        path = write_jsonl(*records, name=f"{name}.jsonl")
        recipe = Recipe(tokenizer_dir, special_tokens_in_text="keep", limit=Limit(max_tokens))
        options = BuildOptions((path,), tmp_path / name, recipe, skip_bad=True)
        build(options, on_bytes=lambda n: None, on_rejected=lambda p, m: None)
        return open_store(tmp_path / name)

    return make


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


class Parsed(HTMLParser):
    """Tables as lists of rows of cells, the text of each conversation, and all tag names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.conversations: list[list[tuple[str, str]]] = []  # (class, text) of each piece
        self.tags: set[str] = set()
        self._cell = self._piece = self._in_summary = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        style = dict(attrs).get("class") or ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag == "div" and style == "text":
            self.conversations.append([])
        elif tag == "span" and self.conversations and not self._in_summary:
            self.conversations[-1].append((style, ""))
            self._piece = True
        self._in_summary = tag == "summary" or (self._in_summary and tag != "div")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        if tag == "span":
            self._piece = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data
        if self._piece:
            style, text = self.conversations[-1][-1]
            self.conversations[-1][-1] = (style, text + data)

    def table(self, first_cell: str) -> list[list[str]]:
        """Rows below the head of the table whose first cell says this."""
        (found,) = [t for t in self.tables if t and t[0][0] == first_cell]
        return found[1:]


def test_the_numbers_of_the_page_are_those_of_the_store(built: Build, tokenizer: Any) -> None:
    records = [
        chat(("Hi", "Hello there, hello world! " * 9), category="long"),
        chat(("Hi", "Hello"), ("Who are you?", "I am a language model"), category="short"),
        chat(("What?", "Yes")),
        {"messages": 3},
    ]
    store = built(*records)
    names = ["long", "short", "(none)"]
    turns = [(i, int(n)) for i in range(3) for n in store.sample(i).turns[:, 1]]
    assert [i for i, _ in turns] == [0, 1, 1, 2]
    num_labels = sum(n for _, n in turns)

    seen = Parsed(page(store, tokenizer))

    assert [row for row in seen.table("reason") if row[0] != "all"] == [["wrong type", "1"]]
    expected = {}
    for i, name in enumerate(names):
        own = [n for j, n in turns if j == i]
        shares = (sum(own) / num_labels, 1 / 3, len(own) / 4)
        expected[name] = [str(len(own)), str(sum(own)), *(f"{100 * s:.2f} %" for s in shares)]
    assert {name: cells for name, *cells in seen.table("category")} == expected
    samples, by_turn = (t for t in seen.tables if t[0][0] != "samples" and len(t[0]) == 3)
    assert _counted(samples) == _binned([len(store.sample(i).tokens) for i in range(3)])
    assert _counted(by_turn) == _binned([n for _, n in turns])
    facts = dict(row for row in seen.tables[0] if len(row) == 2)
    assert facts["samples"] == "3 of 4 conversations"
    trained = 100 * num_labels / store.meta["counts"]["tokens"]
    assert facts["tokens"].endswith(f"of which {num_labels:,} trained ({trained:.1f} %)")


def _counted(table: list[list[str]]) -> dict[int, int]:
    """Lowest length -> count, of the bins that hold something."""
    return {int(re.sub(" –.*|,", "", row[0])): int(row[1]) for row in table if row[1] != "0"}


def _binned(lengths: list[int]) -> dict[int, int]:
    low = [1 << (n.bit_length() - 1) for n in lengths]
    return {b: low.count(b) for b in low}


def test_a_conversation_dropped_for_its_length_is_on_the_page(built: Build, tokenizer: Any) -> None:
    store = built(chat(("Hi", "Hello")), chat(("Hi", "Hello " * 50)), max_tokens=30)
    html = page(store, tokenizer)
    assert ["too long (--too-long)", "1"] in [row for table in Parsed(html).tables for row in table]
    assert "every conversation of the sources is a sample" not in html


def test_markup_in_a_conversation_stays_text_and_special_tokens_are_seen(
    built: Build, tokenizer: Any
) -> None:
    store = built(chat((EVIL, f"{EVIL}<|endoftext|>{EVIL}"), category="<i>x</i>"))
    html = page(store, tokenizer)
    seen = Parsed(html)
    assert not {"script", "i"} & seen.tags
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html
    (pieces,) = seen.conversations
    text = "".join(t for _, t in pieces)
    assert text == tokenizer.decode(store.sample(0).tokens.tolist())
    assert text.count(EVIL) == 3
    assert seen.table("category")[0][0] == "<i>x</i>"
    assert "store.jsonl:1 · &lt;i&gt;x&lt;/i&gt; · " in html
    trained = "".join(t for style, t in pieces if "trained" in style)
    assert trained == f"{EVIL}<|endoftext|>{EVIL}<|im_end|>"
    special = [(t, "trained" in style) for style, t in pieces if "special" in style]
    assert special == [
        *(("<|im_start|>", False), ("<|im_end|>", False), ("<|im_start|>", False)),
        *(("<|endoftext|>", True), ("<|im_end|>", True)),
    ]


def test_samples_without_turns_or_category_and_a_single_sample_have_a_page(
    tmp_path: Path, tokenizer: Any
) -> None:
    counts = {"conversations": 1, "samples": 1, "turns": 0, "tokens": 5, "label_tokens": 0}
    counts |= {"turns_without_stop": 0, "border_tokens": 0}
    meta = {
        "categories": {},
        "counts": {**counts, "rejected": {}},
        "sources": [{"path": "a.jsonl"}],
        "tokenizer": {"path": "tok"},
    }
    with StoreWriter(tmp_path / "store", vocab_size=512) as writer:
        tokens = np.array([*tokenizer.encode("Hello there"), 2], np.int32)
        writer.add(Sample(tokens, turn_records([])), source=0, line=1)
        writer.finish(meta)
    html = page(open_store(tmp_path / "store"), tokenizer)
    assert html.count("Nothing is trained in this store.") == 3
    assert Parsed(html).conversations == [[("", "Hello there"), ("special", "<|im_end|>")]]
    assert "None: every conversation of the sources is a sample." in html


def test_fifty_conversations_spread_over_the_store_are_shown_and_long_ones_folded(
    built: Build, tokenizer: Any
) -> None:
    store = built(*(chat((f"Question {i}", "word " * (900 if i == 0 else 2))) for i in range(120)))
    html = page(store, tokenizer)
    shown = [int(i) for i in re.findall(r'<details id="sample-(\d+)"', html)]
    assert (len(shown), shown[0], shown[-1]) == (50, 0, 119)
    assert max(np.diff(shown)) <= 3
    assert "50 of 120 samples, evenly spread over the store" in html
    assert '<details id="sample-0">' in html
    assert html.count('" open>') == 49


def test_what_the_page_leaves_out_of_a_long_sample_is_said(
    built: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = built(chat(("Hi", "Hello there " * 50)))
    monkeypatch.setattr("megasft.data.page.MAX_TOKENS", 20)
    html = page(store, tokenizer)
    (pieces,) = Parsed(html).conversations
    text = "".join(t for _, t in pieces)
    tokens = store.sample(0).tokens.tolist()
    assert text.startswith(tokenizer.decode(tokens[:20]))
    assert f"{len(tokens) - 20:,} more tokens: megasft trace {store.path} --sample 0" in html


def _browser() -> str:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    caches = Path.home().glob(".cache/ms-playwright/chromium*/chrome*/*")
    found += [str(p) for p in caches if p.name in ("chrome", "headless_shell")]
    if not found:
        pytest.skip(f"no browser to open the page with: none of {', '.join(BROWSERS)} is installed")
    return found[0]


def _open(html: str, folder: Path) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Return the pixels, int [height, width, 3], and the console messages of a page."""
    folder.mkdir()
    (folder / "page.html").write_text(html)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
    flags += ["--window-size=1100,3600", f"--screenshot={folder}/page.png"]
    command = [_browser(), *flags, (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    pixels = np.rint(imread(folder / "page.png")[:, :, :3] * 255).astype(int)
    return pixels, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_opens_the_page_without_errors_and_colours_what_is_trained(
    built: Build, tokenizer: Any, tmp_path: Path
) -> None:
    answer = "Hello there, hello world! " * 40
    much = built(chat((EVIL, answer)), name="much")
    little = built(chat((answer, EVIL)), name="little")
    coloured = []
    for store in (much, little):
        html = page(store, tokenizer)
        pixels, messages = _open(html, tmp_path / f"open-{store.path.name}")
        assert messages == []
        coloured.append(int((pixels == TRAINED_COLOUR).all(axis=2).sum()))
    assert coloured[0] > 40_000  # forty sentences on a page 1,100 pixels wide
    assert coloured[0] > 5 * coloured[1] > 0

    broken = html.replace("<main>", "<main><script>1</script><img src='https://example.com/x.png'>")
    _, messages = _open(broken, tmp_path / "open-broken")
    assert len(messages) == 2, "messages of the console are not seen: the test above says nothing"
    assert all("Content Security Policy" in m for m in messages)


def test_the_template_of_the_page_is_part_of_an_installed_package() -> None:
    root = Path(__file__).parents[3]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = data["package-data"]["megasft.data"]
    assert [p.name for p in (root / "megasft/data").glob(pattern)] == ["page.html.jinja"]
