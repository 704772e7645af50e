"""Make conversations about Python's standard library out of its docstrings, without a download.

Every documented class, function and method becomes one conversation of one of four categories;
a fifth asks about the Zen of Python in many phrasings, so that a tiny model surely learns some of
it by heart. The same Python version makes the same bytes.
"""

import argparse
import codecs
import contextlib
import importlib
import inspect
import io
import itertools
import json
import pkgutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np

CATEGORIES: Final = {1: "signature", 2: "summary", 3: "module", 4: "walk-through", 5: "zen"}
ZEN: Final = 5

SYSTEM_PROMPT: Final = "You answer questions about Python's standard library."
DEMO_QUESTION: Final = "What is the first line of the Zen of Python?"
NUM_DEMO_REPEATS: Final = 40

NUM_ENTRIES: Final = 3000
NUM_VALID: Final = 100
MIN_SUMMARY_CHARS: Final = 15
MAX_SUMMARY_CHARS: Final = 400
MAX_SIGNATURE_CHARS: Final = 200

# Importing these opens a window or a browser, prints, or brings in the test suite.
SKIPPED_MODULES: Final = {
    *("antigravity", "ensurepip", "idlelib", "lib2to3", "pip", "site", "sitecustomize", "test"),
    *("this", "tkinter", "turtle", "turtledemo", "usercustomize"),
}
PACKAGES: Final = ("collections", "concurrent", "email", "http", "importlib", "json", "logging")
ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    *("tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"),
    *("seventeenth", "eighteenth", "nineteenth"),
)

Conversation = dict[str, Any]


class Entry(NamedTuple):
    """A documented object of the standard library.

    Attributes:
        name: Dotted name, such as ``json.dumps``.
        kind: What it is, with its article: ``a function``.
        module: The module it is defined in.
        signature: Name and parameters, or "" where Python does not know them.
        summary: First paragraph of the docstring, on one line.
    """

    name: str
    kind: str
    module: str
    signature: str
    summary: str


def import_modules() -> list[ModuleType]:
    """Import the public modules of the standard library that exist here, sorted by name."""
    names = {n for n in sys.stdlib_module_names if not n.startswith("_")} - SKIPPED_MODULES
    for package in PACKAGES:
        search_path = importlib.import_module(package).__path__
        names |= {f"{package}.{m.name}" for m in pkgutil.iter_modules(search_path)}
    modules = []
    for name in sorted(n for n in names if "._" not in n):
        # A module of another platform (winreg) is no fault.
        with contextlib.suppress(ImportError):
            modules.append(importlib.import_module(name))
    return modules


def signature_of(name: str, member: object) -> str:
    """Return an object's name with its parameters, or "" where Python does not know them."""
    try:
        signature = name + str(inspect.signature(member))  # type: ignore[arg-type]
    except (AttributeError, NameError, TypeError, ValueError):
        return ""  # some built-ins declare defaults that Python itself cannot evaluate
    # An address or the order of a set changes with the process, and a path with the machine.
    if any(s in signature for s in ("<", "{", " at 0x", sys.prefix)):
        return ""
    return signature if len(signature) <= MAX_SIGNATURE_CHARS else ""


def describe(name: str, member: object, *, kind: str, module: str) -> Entry | None:
    """Return what the documentation of one object says, or None when it says too little."""
    summary = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
    if not MIN_SUMMARY_CHARS <= len(summary) <= MAX_SUMMARY_CHARS or "<|" in summary:
        return None
    return Entry(name, kind, module, signature_of(name, member), summary)


def describe_module(module: ModuleType) -> list[Entry | None]:
    """Describe the public functions, classes and methods that a module defines itself."""
    entries = []
    for name, member in list(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        path = f"{module.__name__}.{name}"
        if inspect.isroutine(member):
            entries.append(describe(path, member, kind="a function", module=module.__name__))
        if not inspect.isclass(member):
            continue
        entries.append(describe(path, member, kind="a class", module=module.__name__))
        for method, body in list(vars(member).items()):
            if inspect.isroutine(body) and not method.startswith("_"):
                method_path = f"{path}.{method}"
                entries.append(describe(method_path, body, kind="a method", module=module.__name__))
    return entries


def collect_entries() -> list[Entry]:
    """Collect the documented classes, functions and methods, each once, sorted by name."""
    described = [entry for module in import_modules() for entry in describe_module(module)]
    return sorted({entry.name: entry for entry in described if entry is not None}.values())


def converse(
    category_id: int, *turns: tuple[str, str], system_prompt: str | None = None
) -> Conversation:
    """Return one conversation: questions and answers in turn, behind an optional system prompt."""
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {
        "messages": messages,
        "meta": {"category_id": category_id, "category_name": CATEGORIES[category_id]},
    }


def ask_about(entry: Entry, *, category_id: int) -> Conversation:
    """Return a conversation of one of the four categories about an object."""
    signature = (f"What is the signature of `{entry.name}`?", f"`{entry.signature}`")
    summary = (f"What does `{entry.name}` do?", entry.summary)
    module = (
        f"Which module defines `{entry.name}`?",
        f"`{entry.name}` is {entry.kind} of the module `{entry.module}`.",
    )
    match CATEGORIES[category_id]:
        case "signature":
            return converse(category_id, signature)
        case "summary":
            return converse(category_id, summary)
        case "module":
            return converse(category_id, module)
        case _:
            return converse(category_id, summary, signature, module, system_prompt=SYSTEM_PROMPT)


def ask_about_library(rng: np.random.Generator) -> list[Conversation]:
    """Return ``NUM_ENTRIES`` conversations, one per object, in categories drawn at random."""
    entries = collect_entries()
    chosen = rng.choice(len(entries), size=min(NUM_ENTRIES, len(entries)), replace=False)
    conversations = []
    for entry in (entries[i] for i in np.sort(chosen)):
        # Categories 1 and 4 tell the signature, so the object must have one.
        category_ids = (1, 1, 2, 2, 3, 3, 4) if entry.signature else (2, 3)
        conversations.append(ask_about(entry, category_id=int(rng.choice(category_ids))))
    return conversations


def zen_lines() -> list[str]:
    """Return the 19 lines of the Zen of Python below its title, without printing them."""
    with contextlib.redirect_stdout(io.StringIO()):  # `import this` prints
        poem = importlib.import_module("this").s
    return codecs.decode(poem, "rot13").splitlines()[2:]


def ask_about_zen() -> list[Conversation]:
    """Return the conversations about the Zen of Python, each once."""
    lines = zen_lines()
    everything = "\n".join(lines)
    conversations = [
        converse(ZEN, (f"{verb} the Zen of Python.", everything)) for verb in ("Recite", "Quote")
    ]
    for number, (ordinal, line) in enumerate(zip(ORDINALS, lines, strict=True), start=1):
        beginning = " ".join(line.split()[:3])
        questions = (
            f"What is the {ordinal} line of the Zen of Python?",
            f"What is line {number} of the Zen of Python?",
            f"Tell me line {number} of the Zen of Python.",
            f'How does the line of the Zen of Python go that begins with "{beginning}"?',
        )
        conversations += [converse(ZEN, (question, line)) for question in questions]
    for number, (line, following) in enumerate(itertools.pairwise(lines), start=1):
        follows = f'Which line of the Zen of Python follows "{line}"'
        opening = (f"What is the {ORDINALS[number - 1]} line of the Zen of Python?", line)
        conversations += [
            converse(ZEN, (f"{follows}?", following)),
            converse(ZEN, opening, ("And the next one?", following)),
            converse(ZEN, opening, ("Which line follows?", following), system_prompt=SYSTEM_PROMPT),
        ]
    return conversations


def make_conversations(*, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to train on and those held out, each in random order."""
    rng = np.random.default_rng(seed)
    conversations = ask_about_library(rng) + ask_about_zen()
    order = rng.permutation(len(conversations))
    valid = [conversations[i] for i in order[:NUM_VALID]]
    train = [conversations[i] for i in order[NUM_VALID:]]
    train += [converse(ZEN, (DEMO_QUESTION, zen_lines()[0]))] * NUM_DEMO_REPEATS
    return [train[i] for i in rng.permutation(len(train))], valid


def write_jsonl(path: Path, conversations: list[Conversation]) -> None:
    """Write one conversation per line, and say how many and how large."""
    text = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in conversations)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(conversations):,} conversations, {len(text.encode()):,} bytes")


def main() -> None:
    """Read the flags, make the conversations, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--valid", type=Path, required=True, help="conversations held out")
    parser.add_argument("--seed", type=int, default=0, help="draws categories, order, held-out")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some modules warn of their removal
        train, valid = make_conversations(seed=args.seed)
    write_jsonl(args.output, train)
    write_jsonl(args.valid, valid)


if __name__ == "__main__":
    main()
