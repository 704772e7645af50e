"""The batch script holds the run's own command, and runs it when Slurm does what it does."""

import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megasft.errors import FlagError
from megasft.files import MODEL_FILE
from megasft.launch.run import Run, resolve
from megasft.launch.slurm import script, submit
from megasft.training.saving import COMPLETE
from tests.unit.launch.conftest import write_programs

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "tools" / "slurm").glob("*.yaml"))
ON_SLURM = (
    *("launch.backend=slurm", "launch.nnodes=2", "launch.slurm.partition=gpu"),
    *("launch.slurm.exclusive=true", "launch.slurm.comment='two words'"),
    "launch.setup=['export PATH=$PWD/bin:$PATH']",
)


def test_the_script_runs_the_command_on_each_node(
    resolved: Callable[..., Run], folder: Path
) -> None:
    """With an srun that runs its command once for each of two nodes."""
    run = resolved(*ON_SLURM, "launch.env.NCCL_DEBUG=INFO", "data.store=['a b']")
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do "$@"; done',
        "torchrun": 'printf "%s\\0" "$NCCL_DEBUG" "$@" >> ran; printf "\\n" >> ran',
    }
    write_programs(folder, programs)
    (folder / "job.sh").write_text(script(run))

    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x"}
    subprocess.run(["bash", "job.sh"], check=True, cwd=folder, env=environment)

    calls = [line.split("\0")[:-1] for line in (folder / "ran").read_text().splitlines()]
    assert len(calls) == 2 and calls[0] == calls[1]
    debug, *words = calls[0]
    assert debug == "INFO"
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:23456"
    assert words[words.index("--rdzv-id") + 1] == "123456"
    assert words[words.index("--nnodes") + 1] == "2"
    assert tuple(words[words.index("megasft.pretrain_sft") + 1 :]) == run.argv


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_job_told_to_end_is_queued_again_until_its_run_is_complete(
    resolved: Callable[..., Run], folder: Path, is_complete: bool
) -> None:
    run = resolved(*ON_SLURM, "launch.slurm.requeue=true")
    assert "requeue" not in script(resolved(*ON_SLURM))
    write_programs(folder, {"scontrol": 'echo "$@" >> called; echo node7', "srun": ":"})
    assert run.save is not None
    run.save.mkdir(parents=True)
    if is_complete:
        (run.save / COMPLETE).touch()
    (folder / "job.sh").write_text(script(run))

    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x"}
    subprocess.run(["bash", "job.sh"], check=True, cwd=folder, env=environment)

    called = (folder / "called").read_text().splitlines()
    assert ("requeue 123456" in called) is not is_complete


def test_options_of_sbatch_are_those_of_the_file(resolved: Callable[..., Run]) -> None:
    lines = script(resolved(*ON_SLURM, "launch.slurm.job-name=mine")).splitlines()

    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert lines[0] == "#!/usr/bin/env bash"
    assert {"--job-name=mine", "--nodes=2", "--partition=gpu", "--exclusive"} <= set(options)
    assert "--comment='two words'" in options
    assert not any("gpus" in option for option in options)  # launch.cpu
    assert len(options) == len({option.partition("=")[0] for option in options})
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert first_command > max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch.slurm.nodes=4", "launch.slurm.nodes is set by megasft, from launch.nnodes"),
        ("launch.slurm.constraint=[a]", r"launch.slurm.constraint is \['a'\]"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    resolved: Callable[..., Run], override: str, message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        script(resolved(*ON_SLURM, override))


def test_without_sbatch_the_script_is_written_and_it_is_said_how_to_submit_it(
    resolved: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = resolved(*ON_SLURM)

    assert submit(run, {"PATH": ""}) == 0

    path = Path("ckpt/run/run.sbatch")
    assert path.read_text() == script(run) and Path("ckpt/run/run.yaml").is_file()
    assert Path("ckpt/run/logs").is_dir()
    if shutil.which("sbatch") is None:
        assert f"has no sbatch; on one that has: sbatch {path}" in caplog.text


@pytest.mark.parametrize("refuses", [True, False])
def test_sbatch_is_asked_first_and_then_given_the_script(
    resolved: Callable[..., Run],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    refuses: bool,
) -> None:
    """With an sbatch that knows no partition, or all."""
    sbatch = folder / "sbatch"
    test_only = "echo 'invalid partition' >&2; exit 1" if refuses else "exit 0"
    sbatch.write_text(
        f'#!/bin/bash\nif [[ $1 == --test-only ]]; then {test_only}; fi\necho "submitted $1"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    run = resolved(*ON_SLURM)
    if refuses:
        with pytest.raises(FlagError, match=r"--test-only refuses .*: invalid partition"):
            submit(run, {"PATH": "/usr/bin:/bin"})
        return
    assert submit(run, {"PATH": "/usr/bin:/bin"}) == 0
    assert capfd.readouterr().out == "submitted ckpt/run/run.sbatch\n"


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A run.yaml of tools/slurm, in a folder where what it names is there."""
    (folder / "Qwen3-8B-megatron").mkdir()
    (folder / "converted" / MODEL_FILE).rename(folder / "Qwen3-8B-megatron" / MODEL_FILE)
    (folder / "tools" / "slurm").mkdir(parents=True)
    path = Path("tools/slurm") / request.param.name
    path.write_text(request.param.read_text())
    return path


def test_the_scripts_in_tools_are_what_is_written_today(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)  # a shell's own is left alone
    kept = (ROOT / example).with_suffix(".sbatch").read_text()
    assert script(resolve(example, ())) == kept


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_scripts_in_tools_are_right_shell(path: Path) -> None:
    kept = path.with_suffix(".sbatch")
    subprocess.run(["bash", "-n", kept], check=True)
    if shutil.which("shellcheck") is None:
        logging.getLogger(__name__).warning("shellcheck is not installed: bash -n alone looked")
    else:
        subprocess.run(["shellcheck", kept], check=True)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed here")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_slurm_accepts_the_scripts_in_tools(path: Path) -> None:
    subprocess.run(["sbatch", "--test-only", path.with_suffix(".sbatch")], check=True)
