"""Worker processes that make samples, fed in order through pipes.

Each worker is ``python -m megasft.data.workers``, started with Popen; one thread speaks to it in
pickles. Chosen over multiprocessing, because its start methods each have a flaw here: spawn and
forkserver import the caller's script again (a script without ``if __name__`` guard would start
itself anew), fork copies threads and locks of whatever the caller has loaded, and a Pool waits
forever for a worker the kernel killed. Here a dead worker is an error, and when the build dies,
however it dies, its workers read end-of-file and leave. Cost: this small protocol.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, Protocol, Self

import megasft
from megasft.data.read import Chunk
from megasft.data.tokenize import Outcome, Recipe, Tokenizer
from megasft.data.tokenizer_folder import TokenizerFacts
from megasft.errors import DataError

Outcomes = list[Outcome]
Records = list[tuple[int, bytes]]
Answer = Outcomes | TokenizerFacts | DataError
CHUNKS_AHEAD: Final = 2
"""Chunks in flight for each worker; more would only hold memory."""


class MakesSamples(Protocol):
    """Whoever makes samples for a build: this process, worker processes, or a cluster."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer."""
        ...

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        ...


class ThisProcess:
    """Makes the samples here, one chunk after the other: no process to start, for small things."""

    def __init__(self, recipe: Recipe) -> None:
        self._tokenizer = Tokenizer(recipe)

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer."""
        return self._tokenizer.facts()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        for chunk in chunks:
            yield chunk, self._tokenizer.make(chunk.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Workers:
    """A fixed number of processes; a context manager, so that none outlives the build."""

    def __init__(self, recipe: Recipe, *, num_workers: int) -> None:
        self._recipe, self._num_workers = recipe, num_workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._starting = threading.Lock()

    def facts(self) -> TokenizerFacts:
        """Return what the store keeps of the tokenizer; starts the first worker."""
        answer = self._ask(None)
        assert isinstance(answer, TokenizerFacts)
        return answer

    def map(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Outcomes]]:
        """Yield each chunk with its outcomes, in the order of the chunks."""
        waiting: deque[tuple[Chunk, Future[Outcomes]]] = deque()
        with ThreadPoolExecutor(self._num_workers) as threads:
            try:
                for chunk in chunks:
                    waiting.append((chunk, threads.submit(self._make, chunk)))
                    if len(waiting) > CHUNKS_AHEAD * self._num_workers:
                        done, future = waiting.popleft()
                        yield done, future.result()
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _make(self, chunk: Chunk) -> Outcomes:
        answer = self._ask(chunk.records)
        assert isinstance(answer, list)
        return answer

    def _ask(self, records: Records | None) -> Answer:
        process = self._take()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(records, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer: Answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DataError(
                f"a worker process died with code {process.wait()} (negative: killed by that "
                "signal, -9 often means out of memory); try fewer --workers"
            ) from None
        self._idle.put(process)
        if isinstance(answer, DataError):
            raise answer
        return answer

    def _take(self) -> subprocess.Popen[bytes]:
        with self._starting:  # there are no more threads than workers: one is idle, or may start
            try:
                return self._idle.get_nowait()
            except Empty:
                self._processes.append(self._start())
                return self._processes[-1]

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(megasft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "TRANSFORMERS_VERBOSITY": "error",  # it would complain that there is no torch
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "megasft.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdin is not None
        pickle.dump(self._recipe, process.stdin)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def serve() -> None:
    """Answer chunks of records on stdin with outcomes on stdout, until the build closes stdin.

    None instead of records asks for the facts of the tokenizer.
    """
    asked = sys.stdin.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the pickles
    sys.modules["torch"] = None  # type: ignore[assignment]  # 500 MB that transformers can spare
    tokenizer: Tokenizer | None = None
    recipe: Recipe = pickle.load(asked)
    while True:
        try:
            records: Records | None = pickle.load(asked)
        except EOFError:
            return
        try:
            tokenizer = tokenizer or Tokenizer(recipe)
            answer: Answer = tokenizer.facts() if records is None else tokenizer.make(records)
        except DataError as error:
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    serve()
