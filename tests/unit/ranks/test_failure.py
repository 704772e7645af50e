"""The error that began a failure is told from those that followed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.ranks.failure import Ended, Failure, first_failure, last_error, seen_ended

OWN = "Traceback (most recent call last):\n  File 'a'\nValueError: it is wrong"
OF_ANOTHER = (
    "Traceback (most recent call last):\n  File 'b'\nRuntimeError: Connection closed by peer"
)


@pytest.fixture
def logs(tmp_path: Path) -> Callable[..., dict[int, Path]]:
    """Write the logs of ranks, each a second later than the one before."""

    def write(*texts: str) -> dict[int, Path]:
        paths = {}
        for rank, text in enumerate(texts):
            paths[rank] = tmp_path / f"{rank}.log"
            paths[rank].write_text(text)
            os.utime(paths[rank], (rank, rank))
        return paths

    return write


def test_torchruns_line_is_read() -> None:
    line = (
        "E1121 17:28:43.275000 23449 torch/distributed/elastic/multiprocessing/api.py:1002] "
        "failed (exitcode: -9) local_rank: 1 (pid: 23469) of binary: python\n"
    )
    assert seen_ended(line) == Ended(rank=1, exit_code=-9)
    assert seen_ended("[rank0]: iteration 3") is None


@pytest.mark.parametrize(
    ("texts", "ended", "rank", "end"),
    [
        ((OWN, OF_ANOTHER), Ended(1, 1), 0, "it is wrong"),  # the other was seen first
        ((OF_ANOTHER, OWN), Ended(1, 1), 1, "it is wrong"),
        ((OF_ANOTHER, OWN, OWN), Ended(2, 1), 2, "it is wrong"),  # two of their own: torchrun's
        ((OF_ANOTHER, OWN, OWN), None, 1, "it is wrong"),  # or the earlier one
        ((OF_ANOTHER, "all is well"), Ended(1, -9), 1, "all is well"),  # killed: says nothing
        ((OWN, "all is well"), Ended(1, -11), 1, "all is well"),
        ((OF_ANOTHER, OF_ANOTHER), Ended(1, 1), 1, "by peer"),
        ((OWN, ""), Ended(1, -15), 0, "it is wrong"),  # torchrun itself ended rank 1
        (("", ""), Ended(0, 3), 0, "(it printed nothing)"),
    ],
)
def test_the_rank_that_began_it_is_found(
    logs: Callable[..., dict[int, Path]], texts: tuple[str, ...], ended: Ended, rank: int, end: str
) -> None:
    found = first_failure(logs(*texts), ended)

    assert found is not None and found.rank == rank and found.text.endswith(end)


def test_nothing_known_is_nothing_said(logs: Callable[..., dict[int, Path]]) -> None:
    assert first_failure(logs("fine", "fine"), None) is None


def test_an_error_is_found_under_torchs_prefix_and_without_what_followed(
    logs: Callable[..., dict[int, Path]],
) -> None:
    text = "x\n" + "".join(f"[rank0]: {line}\n" for line in OWN.splitlines())
    noise = "[rank0]:[W1121 17:01:02.1 ProcessGroupNCCL.cpp:1] Warning\n"
    found = first_failure(logs(text + noise), Ended(0, 1))
    assert found is not None and found.text == OWN


def test_a_chain_of_errors_is_one_error_and_an_earlier_handled_one_is_not_shown() -> None:
    chain = f"{OWN}\n\nDuring handling of the above exception, another exception occurred:\n\n{OWN}"
    assert last_error(f"{OF_ANOTHER}\nwent on\n{chain}".splitlines()) == chain


def test_a_long_error_keeps_both_ends() -> None:
    lines = ["Traceback (most recent call last):", *(f"  {n}" for n in range(500)), "E: end"]
    shown = last_error(lines).splitlines()
    assert shown[0] == lines[0] and shown[-1] == "E: end" and "... 442 lines ..." in shown
    assert len(shown) == 61


def test_a_message_ends_with_who_it_was_and_where_all_of_it_is() -> None:
    killed = Failure(3, -9, "last words", Path("logs/3.log")).message(node=2).splitlines()
    assert killed[0] == "last words"
    assert killed[1].startswith("local rank 3 of node 2 was ended first, by signal 9 (SIGKILL)")
    assert killed[2] == "all that it printed: logs/3.log"
    assert Failure(0, 7, "x", None).message() == "x\nrank 0 failed first, with exit code 7"
