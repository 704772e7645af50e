import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.checks.run.conftest import World
from tests.unit.cli.conftest import Seen

pytestmark = pytest.mark.slow  # imports the real Megatron

Doctor = Callable[..., Seen]


@pytest.fixture(autouse=True)
def keep_loggers() -> Iterator[None]:
    logger = logging.getLogger("megasft")
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


def test_without_flags_only_the_machine_is_looked_at(megasft: Doctor) -> None:
    seen = megasft("doctor")
    assert seen.code == 0
    assert "megatron-core 0.19" in seen.out and "rules checked" in seen.out
    assert "layout" not in seen.out and "Traceback" not in seen.err


def test_a_good_run_is_summed_up_with_its_memory(megasft: Doctor, world: World) -> None:
    flags = world.flags(tensor_model_parallel_size=2, seq_length=128)
    seen = megasft("doctor", "--world-size", 4, "--tokens-per-second", 10, *flags)

    assert seen.code == 0, seen.out
    assert "on 4 ranks = TP 2 x DP 2: 0 errors" in seen.out
    for part in ("an epoch is", "a checkpoint takes", "minutes on 4 ranks at 10 tokens/s each"):
        assert part in seen.out
    assert "memory of the fullest GPU (pipeline stage 0), estimated" in seen.out
    assert "not checked" not in seen.out, "no check failed"
    assert not any(line != line.rstrip() for line in seen.out.splitlines())


def test_too_small_a_gpu_is_a_warning(megasft: Doctor, world: World) -> None:
    seen = megasft("doctor", "--gpu-memory-gb", 3, *world.flags())
    assert seen.code == 0
    assert "warning memory: the fullest GPU needs about 3.2 GB of 3.0 GB" in seen.out
    assert "memory: " not in megasft("doctor", "--gpu-memory-gb", 80, *world.flags()).out


def test_all_errors_are_listed_with_remedies_and_what_could_not_be_checked(
    megasft: Doctor, world: World, tmp_path: Path
) -> None:
    wrong = world.flags(tensor_model_parallel_size=4, megasft_data=world.newer, lr=None)
    report = tmp_path / "report.json"

    seen = megasft("doctor", "--world-size", 6, "--json", report, *wrong)

    assert seen.code == 1
    assert seen.out.count(" error ") == 4
    assert "remedy: use one of 1, 2, 3, 6" in seen.out
    assert "not checked, since a store cannot be read: rows" in seen.out
    found = json.loads(report.read_text())
    errors = {f["rule"]: f for f in found["findings"] if f["severity"] == "error"}
    assert list(errors) == ["missing-flag", "world-size", "heads", "store"]
    assert errors["heads"]["numbers"] == {
        "num_attention_heads": 6,
        "num_query_groups": 6,
        "tp": 4,
    }
    assert "memory" in found["unchecked"][-1]["rules"]


def test_a_flag_nobody_knows_is_one_line_with_the_nearest(megasft: Doctor, world: World) -> None:
    seen = megasft("doctor", *world.flags(), "--glob-batch-size", 8)
    assert seen.code == 1
    assert seen.err == (
        "error: --glob-batch-size is no flag of Megatron or megasft; the nearest is "
        "--global-batch-size\n"
    )


@pytest.mark.parametrize("length", [{"train_iters": 30}, {"megasft_epochs": 1}])
def test_a_complete_run_is_said_to_be_complete_and_not_checked(
    megasft: Doctor, world: World, tmp_path: Path, length: dict[str, object]
) -> None:
    """Where the length is in epochs it is known once there are rows: 81 of them, 21 steps of 4."""
    last = 30 if "train_iters" in length else 21
    (tmp_path / f"iter_{last:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(last))
    (tmp_path / "complete.json").write_text(json.dumps({"iteration": last}))
    place = {"save": tmp_path, "load": tmp_path, "train_iters": None}
    seen = megasft("doctor", *world.flags(**(place | length)))
    assert seen.code == 0, seen.out
    assert f"note    complete: the run is complete: {tmp_path} holds its last" in seen.out
    assert "not-saved" not in seen.out and "resume" not in seen.out


def test_json_goes_to_stdout_alone_where_that_is_asked(megasft: Doctor, world: World) -> None:
    seen = megasft("doctor", "--json", "-", *world.flags())
    facts = json.loads(seen.out)["facts"]
    assert facts["layout"]["world_size"] >= 1
    assert facts["memory"]["total"] == sum(p["num_bytes"] for p in facts["memory"]["parts"])


def test_all_rules_can_be_listed(megasft: Doctor) -> None:
    from megasft.checks.run.run import RULES

    lines = megasft("doctor", "--list").out.splitlines()
    assert [line.split()[1] for line in lines] == list(RULES)
