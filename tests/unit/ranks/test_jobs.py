"""Jobs of one number of ranks share a start, and one that ends its ranks does not end the rest."""

from pathlib import Path

import pytest

from megasft.ranks import jobs
from megasft.ranks.jobs import reason


def test_the_reason_is_the_end_of_a_traceback() -> None:
    text = 'Traceback (most recent call last):\n  File "a.py", line 3, in f\n    g()\n'
    text += '  File "b.py", line 9, in g\n    raise ValueError()\nValueError: 3 is odd\n'
    assert reason(text) == "ValueError: 3 is odd"
    text = "[rank0]: KeyError: 'x'\nE1121 11:30 torch/distributed/elastic/api.py] failed\nmore\n"
    assert reason(text) == "KeyError: 'x'"
    assert "memory runs out" in reason(text + "exitcode: -9, Signal 9 (SIGKILL) received")
    assert reason("") == "the processes ended without an error message"


@pytest.mark.slow
def test_each_job_is_reported_as_it_ends_and_the_rest_is_started_again(tmp_path: Path) -> None:
    """Silence is allowed for less time than the long job takes, which makes steps."""
    acts = ("write", "refuse", "raise", "write", "be killed", "hang", "take long")
    outputs = [tmp_path / f"{i}.out" for i in range(len(acts))]
    outputs[2].write_text("left by an earlier run")
    found = jobs.run(
        [{"act": a, "output": str(o)} for a, o in zip(acts, outputs, strict=True)],
        world_size=1,
        module="tests.unit.ranks.jobs_worker",
        folder=tmp_path,
        silent_seconds=8.0,
        num_steps=lambda: sum(p.stat().st_size for p in tmp_path.glob("*.progress")),
        advice="; take less",
    )
    first = next(found)
    assert first == "" and not outputs[6].exists(), "the last is still to be done"
    assert [first, *found] == [
        "",
        "there is no store",
        "ValueError: this job fails",
        "",
        "a process was ended by SIGKILL, as when memory runs out; take less",
        "the processes gave no sign of life in 8 s",
        "",
    ]
    assert [o.exists() for o in outputs] == [True, False, False, True, False, False, True]
    assert len({outputs[i].read_text() for i in (0, 3, 6)}) == 3, (
        "processes that ended are replaced"
    )
