"""A run.yaml is examined as its ranks would be, from any machine, with the lines that are wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.checks.engine import Severity
from megasft.launch.examination import examine
from megasft.launch.run import Run
from tests.unit.checks.run.conftest import World
from tests.unit.launch.conftest import write_hf

pytestmark = pytest.mark.slow  # imports the real Megatron

Found = dict[str, tuple[Severity, str]]
NEEDS_TE = "model.transformer_impl=transformer_engine"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def stores(world: World, folder: Path) -> None:
    """Put stores, and a Hugging Face folder, beside the run.yaml."""
    for name in ("store", "other"):
        (folder / name).symlink_to(getattr(world, name))
    write_hf(folder / "hf", world.tokenizer)


@pytest.fixture
def found(stores: None, resolved: Callable[..., Run]) -> Callable[..., Found]:
    """Return what is found of RUN_YAML with some overrides, by the name of the rule."""

    def examined(*overrides: str) -> Found:
        report = examine(resolved("model.hf=hf", *overrides))
        return {each.rule: (each.severity, each.message) for each in report.findings}

    return examined


def errors(found: Found) -> dict[str, str]:
    return {rule: said for rule, (severity, said) in found.items() if severity is Severity.ERROR}


def test_a_run_whose_model_is_yet_to_be_converted_starts_from_it(
    found: Callable[..., Found], folder: Path
) -> None:
    """Its tokenizer is compared, its weights are not random, and no folder is made for it."""
    rules = found()
    assert not errors(rules) and not {"random-weights", "tokenizer-unknown"} & rules.keys()
    assert not (folder / "ckpt").exists()
    assert errors(found("data.store=other"))["tokenizer"].endswith(
        "(override data.store=other); build the store again with --tokenizer hf"
    )


def test_all_lines_of_a_contradiction_are_named(
    found: Callable[..., Found],
) -> None:
    said = errors(found("optim.min_lr=1", "parallel.context_parallel_size=4"))
    assert said == {
        "contradicting-flags": "--min-lr 1 is above --lr 0.001 (override optim.min_lr=1, "
        "run.yaml:13 optim.lr); swap them, or drop --min-lr",
        "world-size": "the world size of 2 ranks is no multiple of 4 = TP 1 x PP 1 x CP 4, the "
        "ranks of one copy of the model (run.yaml:2 launch.nproc_per_node, override "
        "parallel.context_parallel_size=4); start 4 ranks, or split the model less",
    }


def test_the_doctor_may_be_asked_of_another_number_of_ranks(
    stores: None, resolved: Callable[..., Run]
) -> None:
    run = resolved("model.hf=hf", "parallel.context_parallel_size=4")
    assert {e.rule for e in examine(run).of(Severity.ERROR)} == {"world-size"}
    assert not examine(run, world_size=4).of(Severity.ERROR)


def test_a_machine_that_only_submits_need_not_have_what_ranks_on_gpus_need(
    found: Callable[..., Found],
) -> None:
    assert "refused-flag" in errors(found(NEEDS_TE))
    on_slurm = ("launch.backend=slurm", "launch.cpu=false", "optim.train_iters=0")
    rules = found(NEEDS_TE, *on_slurm)
    assert rules["refused-flag"][0] is Severity.WARNING
    assert rules["refused-flag"][1].startswith("here, where there is no GPU: --transformer-impl")
    assert list(errors(rules)) == ["size-not-positive"]


def test_the_environment_of_the_ranks_is_looked_at_and_put_back(
    found: Callable[..., Found],
) -> None:
    said = found("launch.env.NCCL_DEBUG=TRACE")["slow-environment"][1]
    assert said.startswith("NCCL_DEBUG=TRACE") and "NCCL_DEBUG" not in os.environ


def test_a_finding_names_no_secret(
    found: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "hunter2")
    said = errors(found("data.store=${oc.env:STORE_TOKEN}"))["store"]
    assert said.startswith("${oc.env:STORE_TOKEN} is not a token store") and "hunter2" not in said
