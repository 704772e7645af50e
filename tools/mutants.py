"""Break the code in one place at a time, and see that a test notices.

``tools/mutants.toml`` lists defects that would train, convert or report something wrong without an
error: each is one change of one file, and the test that must fail of it. Tests run on copies of the
repository's files; the tree itself is not touched. First they must all pass on a clean copy, then
each must fail on a copy with its defect, and not because a module cannot be imported.

Processes are forked from one that has imported torch and Megatron, which takes longer than most of
these tests. A tool that invents mutants by itself was rejected: most of what it changes does not
matter, and each costs a test run.

Usage: python tools/mutants.py           all of them
       python tools/mutants.py A5 T2     some
       python tools/mutants.py --list    what there is
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "tools" / "mutants.toml"

LEAST_FAST: Final = 38
"""Defects that the tests of ``make check`` must notice; the others may be left to slow tests."""

LIMIT_SECONDS: Final = 600
"""Of one test; a defect that makes ranks wait for each other is not waited for."""

IMPORTED_ONCE: Final = ("pytest", "torch", "transformers", "megatron.training.training")
"""What tests import that is not ours, before the first fork, for all of them."""

QUIET: Final = ("-q", "--disable-warnings", "-p", "no:cacheprovider")

BROKEN: Final = re.compile(
    r"^E\s+(?:\w+\.)*(?:SyntaxError|NameError|ImportError|ModuleNotFoundError)\b", re.MULTILINE
)
"""In what pytest prints of a failure: the defect is no defect, but a program that does not run."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One defect.

    Attributes:
        name: Short, and how it is chosen.
        defect: What goes wrong, in a sentence.
        file: Where, from the root of the repository.
        old: A text that is there once.
        new: What makes it wrong.
        test: The pytest node that must fail.
    """

    name: str
    defect: str
    file: str
    old: str
    new: str
    test: str


class Outcome(NamedTuple):
    """What became of a test on a mutant.

    Attributes:
        code: Exit code of pytest.
        failures: What failed, as pytest prints it.
        is_slow: The test is marked slow.
    """

    code: int
    failures: tuple[str, ...] = ()
    is_slow: bool = False

    @property
    def verdict(self) -> str:
        """``caught``, or why it is not."""
        if self.code != 1:
            return "NOT CAUGHT" if self.code == 0 else f"BROKEN (pytest ended with {self.code})"
        return "BROKEN (see below)" if any(map(BROKEN.search, self.failures)) else "caught"


def read_table(path: Path = TABLE) -> list[Mutant]:
    """Return all mutants."""
    return [Mutant(name, **fields) for name, fields in tomllib.loads(path.read_text()).items()]


def faults(mutant: Mutant, root: Path = ROOT) -> Iterator[str]:
    """Yield what of a table's entry does not fit the code."""
    place = f"{mutant.name} in {TABLE.name}"
    if not (root / mutant.file).is_file():
        yield f"{place}: there is no {mutant.file}"
    elif (count := (root / mutant.file).read_text().count(mutant.old)) != 1:
        yield f"{place}: {mutant.file} holds {mutant.old!r} {count} times; it must be there once"
    if mutant.old == mutant.new:
        yield f"{place}: old and new are the same"
    path, _, name = mutant.test.partition("::")
    body = ast.parse((root / path).read_text()).body if (root / path).is_file() else []
    found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    if name.partition("[")[0] not in found:
        yield f"{place}: there is no test {mutant.test}"


def copy_files(folder: Path) -> None:
    """Copy the repository's files, new ones too, and leave out what git ignores."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables with which this process's children import from a copy."""
    return os.environ | {"PYTHONPATH": str(folder)}


def run_clean(folder: Path, tests: Sequence[str], *, jobs: int) -> int:
    """Run tests on the clean copy, files side by side; return pytest's exit code."""
    spread = ("-n", str(jobs), "--dist", "loadfile") if jobs > 1 and len(tests) > 1 else ()
    command = (sys.executable, "-m", "pytest", *QUIET, *spread, *tests)
    return subprocess.run(command, cwd=folder, env=environment(folder), check=False).returncode


class Watcher:
    """A pytest plugin that keeps what an ``Outcome`` tells."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.is_slow = False

    def pytest_collection_modifyitems(self, items: Sequence[Any]) -> None:
        """See which tests there are."""
        self.is_slow = any(item.get_closest_marker("slow") for item in items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See what came of a test."""
        if report.failed:
            self.failures.append(report.longreprtext)


def run_mutant(mutant: Mutant, folder: Path, result: Connection) -> None:
    """Run the test of a mutant in this process, which is a fork, and send its outcome."""
    import pytest

    os.setsid()  # so that what the test starts can be ended with it
    output = os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    # Bytecode of the mutant must not be taken for that of the clean file.
    os.environ |= environment(folder) | {"PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    watcher = Watcher()
    code = pytest.main([*QUIET, "-x", mutant.test], plugins=[watcher])
    result.send(Outcome(int(code), tuple(watcher.failures), watcher.is_slow))


class Run:
    """The test of one mutant, under way on a copy of its own."""

    def __init__(self, mutant: Mutant, clean: Path) -> None:
        self.mutant, self.began = mutant, time.monotonic()
        self._folder = TemporaryDirectory(prefix="mutant-")
        folder = Path(self._folder.name) / "tree"
        shutil.copytree(clean, folder)
        file = folder / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new, 1))
        self.result, sends = multiprocessing.Pipe(duplex=False)
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=run_mutant, args=(mutant, folder, sends))
        self._process.start()
        sends.close()

    def end(self) -> Outcome:
        """Return the outcome, and end what is left of the processes."""
        try:
            outcome = self.result.recv() if self.result.poll() else Outcome(code=-signal.SIGKILL)
        except EOFError:  # it died
            outcome = Outcome(code=-signal.SIGABRT)
        assert self._process.pid is not None, "it was started"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.result.close()
        self._folder.cleanup()
        return outcome


def run_all(mutants: Sequence[Mutant], clean: Path, *, jobs: int) -> Iterator[tuple[Run, Outcome]]:
    """Yield mutants as their tests end, ``jobs`` at a time."""
    with warnings.catch_warnings(action="ignore"):
        for name in IMPORTED_ONCE:
            importlib.import_module(name)
    waiting, running = list(reversed(mutants)), list[Run]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Run(waiting.pop(), clean))
            ready = wait([run.result for run in running], timeout=1)
            for run in tuple(running):
                if run.result in ready or time.monotonic() - run.began > LIMIT_SECONDS:
                    running.remove(run)
                    yield run, run.end()
    finally:
        for run in running:
            run.end()


def try_mutants(mutants: Sequence[Mutant], *, jobs: int, least_fast: int) -> bool:
    """Try mutants and print what comes of each; say whether the tests are good enough."""
    counts = Counter[str]()
    with TemporaryDirectory(prefix="mutants-") as name:
        clean = Path(name)
        copy_files(clean)
        tests = sorted({mutant.test for mutant in mutants})
        print(f"{len(tests)} tests on the clean copy", flush=True)
        if run_clean(clean, tests, jobs=jobs):
            print("the tests do not pass without a defect; nothing was tried")
            return False
        for number, (run, outcome) in enumerate(run_all(mutants, clean, jobs=jobs), start=1):
            mutant, kind = run.mutant, "slow" if outcome.is_slow else "fast"
            seconds = time.monotonic() - run.began
            place = f"{number:2}/{len(mutants)} {mutant.name:3}"
            print(
                f"{place} {outcome.verdict}, {kind}, {seconds:.0f} s: {mutant.defect}", flush=True
            )
            if outcome.verdict != "caught":
                print(f"{mutant.test}", *outcome.failures, sep="\n", flush=True)
            counts[kind if outcome.verdict == "caught" else "not caught"] += 1
    print(
        f"{len(mutants)} defects: {counts['fast']} caught by tests of `make check`, "
        f"{counts['slow']} by slow tests, {counts['not caught']} not caught"
    )
    if counts["fast"] < least_fast:
        print(f"tests of `make check` must catch {least_fast} at least")
    return not counts["not caught"] and counts["fast"] >= least_fast


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; all without one")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="mutants at a time (default: one per core)",
    )
    return parser


def main() -> int:
    """Return 0 when every chosen mutant is caught."""
    args = arguments().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py, before torch is imported
    table = {mutant.name: mutant for mutant in read_table()}
    unknown = [name for name in args.names if name not in table]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(table)}")
        return 2
    chosen = [table[name] for name in args.names] or list(table.values())
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:4} {mutant.file}: {mutant.defect}\n     {mutant.test}")
        return 0
    wrong = [fault for mutant in chosen for fault in faults(mutant)]
    if wrong:
        print("\n".join(wrong))
        return 2
    least_fast = 0 if args.names else LEAST_FAST
    return 0 if try_mutants(chosen, jobs=args.jobs, least_fast=least_fast) else 1


if __name__ == "__main__":
    sys.exit(main())
