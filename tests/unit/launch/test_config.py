"""A run.yaml is read with its overrides, and every complaint says where."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.errors import FlagError
from megasft.launch.config import read


def values(path: Path, *overrides: str) -> dict[str, object]:
    return {setting.name: setting.value for setting in read(path, overrides)}


def test_dashes_are_underscores_and_an_override_meets_its_key(
    write_run: Callable[[str], Path],
) -> None:
    path = write_run("optim: {min-lr: 1e-4, lr: 1e-3}\ndata: {store: [a, b]}")

    assert values(path, "optim.min_lr=2e-4", "data.store=[c]") == {
        "optim.min_lr": 2e-4,
        "optim.lr": 1e-3,
        "data.store": ["c"],
    }


def test_null_takes_a_key_back_and_an_equals_sign_may_be_in_a_value(
    write_run: Callable[[str], Path],
) -> None:
    path = write_run("checkpoint: {save: x}\nlog: {wandb_project: y}\neval:")

    assert values(path, "checkpoint.save=null", "data.valid=maths=store") == {
        "log.wandb_project": "y",
        "data.valid": "maths=store",
    }


def test_keys_and_the_environment_can_be_referred_to(
    write_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORK", "/w")
    path = write_run(
        """
        checkpoint: {save: "${oc.env:WORK}/run"}
        log: {tensorboard_dir: "${checkpoint.save}/tb", name: "${oc.env:NOT_SET,none}"}
        """
    )

    assert values(path, "checkpoint.save=here") == {
        "checkpoint.save": "here",
        "log.tensorboard_dir": "here/tb",
        "log.name": "none",
    }


def test_parts_of_a_mapping_can_be_overridden_one_by_one(write_run: Callable[[str], Path]) -> None:
    path = write_run("launch: {env: {A: 1}}")

    assert values(path, "launch.env.B=2", "launch.env.C=3") == {
        "launch.env": {"A": 1, "B": 2, "C": 3}
    }


def test_a_setting_knows_its_line_or_its_override(write_run: Callable[[str], Path]) -> None:
    path = write_run("# a comment\noptim:\n  lr: 1\n  min-lr: 2\n")

    places = {s.name: s.place for s in read(path, ["optim.lr=3"])}

    assert places == {"optim.lr": "override optim.lr=3", "optim.min_lr": "run.yaml:4"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- a\n- b", (), "run.yaml is a list; a run has sections"),
        ("optim: 3", (), "run.yaml:1: optim is not a section with keys; put the key in"),
        ("optim: {lr: [1}", (), "run.yaml:1: "),
        ("optim:\n  lr: 1\n  lr: 2", (), "run.yaml:3: found duplicate key lr"),
        ("optim: {min-lr: 1, min_lr: 2}", (), "optim.min_lr is set twice, with dashes and without"),
        ("optim: {on: 1}", (), "YAML takes the key optim.True for no text; quote it"),
        ("a: {b: 1}\noptim:\n  lr: ${optim.rate}", (), "run.yaml:3: optim.lr: .*optim.rate"),
        ("optim:\n  lr: ${oc.env:NOT_THERE}", (), "run.yaml:2: optim.lr: .*NOT_THERE"),
        ("optim:\n  lr: ???", (), "run.yaml:2: optim.lr: .*lr"),
        (
            "launch:\n  slurm:\n    time: 24:00:00",
            (),
            "run.yaml:3: YAML takes 24:00:00 for a number",
        ),
        ("optim: {lr: 1}", ("optim.lr",), "override optim.lr: it is written section.key=value"),
        ("optim: {lr: 1}", ("lr=2",), "override lr=2: it is written section.key=value"),
        ("optim: {lr: 1}", ("optim.lr=2", "optim.lr=3"), "optim.lr is given by two overrides"),
        ("optim: {lr: 1}", ("optim.lr=[",), r"override optim.lr=\["),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(
    write_run: Callable[[str], Path], text: str, overrides: tuple[str, ...], message: str
) -> None:
    path = write_run(text)
    with pytest.raises(FlagError, match=message):
        read(path, overrides)


def test_a_file_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(FlagError, match=r"absent\.yaml cannot be read: No such file"):
        read(Path("absent.yaml"), ())


def test_a_clock_time_stays_one(write_run: Callable[[str], Path]) -> None:
    path = write_run("launch: {slurm: {time: '24:00:00'}}")
    assert values(path) == {"launch.slurm": {"time": "24:00:00"}}
    assert values(path, "launch.slurm.time=12:00:00") == {"launch.slurm": {"time": "12:00:00"}}
