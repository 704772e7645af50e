"""Secrets and the environment are never written or printed by their values."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megasft.errors import ConversionError, FlagError
from megasft.launch import saved, slurm
from megasft.launch.backends import print_run
from megasft.launch.command import shell
from megasft.launch.run import Run, resolve
from megasft.launch.written import is_secret, override, shell_word
from tests.unit.launch.conftest import write_programs

SECRETS = {
    "FAKE_KEY": "from-the-shell-1",
    "FAKE_WORK": "/from/the-shell-2",
    "FAKE_NAME": "shell-3",
    "FAKE_LEVEL": "shell-4",
}
LITERAL, DEFAULT = "given-as-it-is-5", "a-default-6"
RUN_YAML = """
launch:
  nproc_per_node: 2
  cpu: true
  env:
    WANDB_API_KEY: "${oc.env:FAKE_KEY}"
    HF_TOKEN: given-as-it-is-5
    db_password: "${oc.env:ABSENT,a-default-6}"
    NCCL_DEBUG: "${oc.env:FAKE_LEVEL}"
    PLAIN: "${optim.train_iters} of ${oc.env:ABSENT,four steps}"
    TOKENIZERS_PARALLELISM: false
  slurm: {account: "${oc.env:FAKE_NAME}", partition: gpu}
  setup: ['module load "${oc.env:FAKE_NAME}"', 'export PATH=$PWD/bin:$PATH']
model: {hf: converted}
data: {store: ["${oc.env:FAKE_WORK}/store"], seq_length: 96, micro_batch_size: 1, global_batch_size: 8}
loss: {calculate_per_token_loss: true}
optim: {train_iters: 4, lr: 1e-3}
checkpoint: {save: "ckpt/${oc.env:FAKE_NAME}", save_interval: 2, export_hf: true}
log: {tensorboard_dir: "${checkpoint.save}/tb", wandb_project: "${oc.env:ABSENT,none}"}
"""  # noqa: E501
HERE = (*("launch.slurm=null", "launch.setup=null"),)


@pytest.fixture
def run_with_secrets(
    write_run: Callable[[str], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return lambda *overrides: resolve(write_run(RUN_YAML), overrides)


def found(text: str) -> list[str]:
    return [secret for secret in (*SECRETS.values(), LITERAL, DEFAULT) if secret in text]


def all_files(folder: Path) -> dict[str, str]:
    paths = [path for path in (folder / "ckpt").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder / "ckpt")): path.read_text() for path in paths}


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_no_value_of_the_environment_is_written_or_printed(
    run_with_secrets: Callable[..., Run],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    backend: str,
) -> None:
    """Everything a start writes and prints is searched, and that of a changed start."""
    more = () if backend == "slurm" else HERE
    for lr in ("1e-3", "2e-3"):
        key = f"launch.env.OTHER_API_KEY={LITERAL}"
        run = run_with_secrets(f"launch.backend={backend}", f"optim.lr={lr}", key, *more)
        assert run.environment["WANDB_API_KEY"] == SECRETS["FAKE_KEY"]
        assert run.environment["OTHER_API_KEY"] == run.environment["HF_TOKEN"] == LITERAL
        print_run(run, {})
        if backend == "slurm":
            slurm.submit(run, {"PATH": "/usr/bin"})
        else:
            saved.save(run)

    files = all_files(folder)
    save = SECRETS["FAKE_NAME"]
    names = {f"{save}/run.yaml", f"{save}/run.1.yaml", f"{save}/run.sh"}
    assert set(files) == names | ({f"{save}/run.sbatch"} if backend == "slurm" else set())
    assert {name: found(text) for name, text in files.items() if found(text)} == {}
    printed = capfd.readouterr()
    assert "OTHER_API_KEY=" in printed.out and found(printed.out + printed.err) == []
    assert "optim.lr 0.001 -> 0.002" in caplog.text
    # A log line may name the folder that was written to.
    assert set(found(caplog.text)) <= {save}


def test_the_kept_file_holds_interpolations_and_starts_the_same_run(
    run_with_secrets: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with_secrets(*HERE)
    saved.save(run)
    assert run.save is not None
    kept = yaml.safe_load((run.save / "run.yaml").read_text())

    assert kept["launch"]["env"] == {
        "WANDB_API_KEY": "${oc.env:FAKE_KEY}",
        "HF_TOKEN": "${oc.env:HF_TOKEN}",
        "db_password": "${oc.env:ABSENT}",
        "NCCL_DEBUG": "${oc.env:FAKE_LEVEL}",
        "PLAIN": "4 of ${oc.env:ABSENT,four steps}",
        "TOKENIZERS_PARALLELISM": False,
    }
    assert kept["data"]["store"] == ["${oc.env:FAKE_WORK}/store"]
    assert kept["log"]["tensorboard_dir"] == "ckpt/${oc.env:FAKE_NAME}/tb"
    with pytest.raises(FlagError, match="HF_TOKEN"):
        resolve(run.save / "run.yaml", ())
    monkeypatch.setenv("HF_TOKEN", LITERAL)
    monkeypatch.setenv("ABSENT", DEFAULT)
    again = resolve(run.save / "run.yaml", ["launch.env.PLAIN=4 of four steps"])
    assert again.environment == run.environment
    changed = [pair for pair in zip(again.argv, run.argv, strict=True) if len(set(pair)) > 1]
    assert changed == [(DEFAULT, "none")]  # log.wandb_project


@pytest.mark.parametrize("is_exported", [True, False])
def test_the_kept_script_runs_with_the_values_once_they_are_exported(
    run_with_secrets: Callable[..., Run], folder: Path, is_exported: bool
) -> None:
    run = run_with_secrets(*HERE, "launch.env.db_password=one")
    saved.save(run)
    shown = '"$WANDB_API_KEY" "$HF_TOKEN" "$NCCL_DEBUG" "$PLAIN" "$@"'
    write_programs(folder, {"torchrun": f'printf "%s\\0" {shown} > ran'})
    assert run.save is not None
    text = re.sub(r"(?m)\S*/torchrun ", "torchrun ", (run.save / "run.sh").read_text())
    needed = "FAKE_KEY HF_TOKEN db_password FAKE_LEVEL FAKE_WORK FAKE_NAME\n"
    assert f"# not kept here, to be exported before: {needed}" in text
    environment = SECRETS | {"PATH": f"{folder}/bin:/usr/bin:/bin", "db_password": "one"}
    if is_exported:
        environment["HF_TOKEN"] = LITERAL

    ended = subprocess.run(
        ["bash", "-c", text], env=environment, cwd=folder, capture_output=True, text=True
    )

    if not is_exported:
        assert ended.returncode != 0 and "HF_TOKEN: export it first" in ended.stderr
        assert not (folder / "ran").exists()
        return
    assert ended.returncode == 0, ended.stderr
    *values, _ = (folder / "ran").read_text().split("\0")
    names = ("WANDB_API_KEY", "HF_TOKEN", "NCCL_DEBUG", "PLAIN")
    assert values[:4] == [run.environment[name] for name in names]
    assert values[values.index("--log-dir") + 1] == str(run.log_dir)
    assert tuple(values[values.index("megasft.pretrain_sft") + 1 :]) == run.argv


def test_a_job_has_the_secrets_in_the_environment_of_sbatch_and_not_in_its_script(
    run_with_secrets: Callable[..., Run], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An sbatch and an srun that run their command; a line after #SBATCH knows no variables."""
    programs = {
        "sbatch": '[[ $1 == --test-only ]] || { printf "%s\\n" "$@" > given; bash "${@: -1}"; }',
        "scontrol": "echo node7",
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
        "module": 'echo "$@" > module',
        "torchrun": 'printf "%s\\0" "$WANDB_API_KEY" "$HF_TOKEN" "$@" > ran',
        "megasft": ":",
    }
    write_programs(folder, programs)
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    run = run_with_secrets("launch.backend=slurm", "launch.env.db_password=one")
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "x", "PATH": path}

    assert slurm.submit(run, SECRETS | job) == 0

    assert run.save is not None
    given = (folder / "given").read_text().splitlines()
    assert given[:-1] == [
        f"--job-name={SECRETS['FAKE_NAME']}",
        f"--output={run.log_dir}/slurm-%j.out",
        f"--account={SECRETS['FAKE_NAME']}",
    ]
    lines = (run.save / "run.sbatch").read_text().splitlines()
    assert "#SBATCH --partition=gpu" in lines
    assert any(line.startswith("# sbatch --job-name=") for line in lines)
    key, token, *words = (folder / "ran").read_text().split("\0")[:-1]
    assert (key, token) == (SECRETS["FAKE_KEY"], LITERAL)
    assert tuple(words[words.index("megasft.pretrain_sft") + 1 :]) == run.argv
    assert (folder / "module").read_text() == f"load {SECRETS['FAKE_NAME']}\n"


def test_a_job_that_would_lack_its_variables_is_refused(
    run_with_secrets: Callable[..., Run],
) -> None:
    run = run_with_secrets("launch.backend=slurm", "launch.slurm.export='NONE'")
    with pytest.raises(FlagError, match=r"launch\.slurm\.export NONE keeps FAKE_KEY, HF_TOKEN"):
        slurm.script(run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.env.MY_KEY=[given-as-it-is-5"], r"launch.env.MY_KEY=\$\{oc.env:MY_KEY\}"),
        (["launch.env={MY_KEY: given-as-it-is-5"], r"override launch.env=\.\.\."),
        (["launch={env: {MY_KEY: given-as-it-is-5}}"], r"override launch=\.\.\.: it is written"),
        (["env.MY_KEY=given-as-it-is-5"], "unknown section env"),
        (["launch.envs.MY_KEY=given-as-it-is-5"], "unknown key envs"),
        (["optim.lr=${oc.env:FAKE_KEY}"], r"invalid float value: '\$\{oc.env:FAKE_KEY\}'"),
        (["model.hf=${launch.env.HF_TOKEN}"], r"model.hf: \$\{oc.env:HF_TOKEN\} is not there"),
    ],
)
def test_an_error_names_a_secret_and_does_not_show_it(
    run_with_secrets: Callable[..., Run], overrides: list[str], message: str
) -> None:
    with pytest.raises((FlagError, ConversionError), match=message) as error:
        run_with_secrets(*HERE, *overrides)
    assert found(str(error.value)) == []


def test_a_secret_that_an_older_file_holds_is_not_shown_as_a_change(
    run_with_secrets: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_with_secrets(*HERE)
    assert run.save is not None
    run.save.mkdir(parents=True)
    old = {"launch": {"env": {"HF_TOKEN": LITERAL}}, "optim": {"lr": 1}}
    (run.save / "run.yaml").write_text(json.dumps(old))

    saved.save(run)

    assert "optim.lr 1 -> 0.001" in caplog.text and LITERAL not in caplog.text


def test_the_same_start_again_writes_nothing(run_with_secrets: Callable[..., Run]) -> None:
    run = run_with_secrets(*HERE)
    saved.save(run)
    assert run.save is not None
    before = {path: path.stat().st_mtime_ns for path in run.save.iterdir()}
    inodes = {path: path.stat().st_ino for path in run.save.iterdir()}

    saved.save(run_with_secrets(*HERE))

    assert {path: path.stat().st_mtime_ns for path in run.save.iterdir()} == before
    assert {path: path.stat().st_ino for path in run.save.iterdir()} == inodes


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr=1",
        "launch.env.A=b",
        "launch.env={A: 1}",
        "optim.fim_prefix_token=x",
        "launch.slurm.comment=a key",
        "launch.env.A_KEY=${oc.env:B}",
        "no equals sign",
    ],
)
def test_an_override_without_a_secret_is_shown_as_it_was_typed(text: str) -> None:
    assert override(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("launch.env.WANDB_API_KEY=abc", "launch.env.WANDB_API_KEY=${oc.env:WANDB_API_KEY}"),
        ("launch.env.A_KEY=${oc.env:B,abc}", "launch.env.A_KEY=${oc.env:B}"),
        ("launch.env={HF_TOKEN: abc, A: 1}", "launch.env={HF_TOKEN: '${oc.env:HF_TOKEN}', A: 1}"),
        ("launch.env={HF_TOKEN: abc", "launch.env=..."),
        ("launch={env: {HF_TOKEN: abc}}", "launch=..."),
        ("env.HF_TOKEN=abc", "env.HF_TOKEN=${oc.env:HF_TOKEN}"),
    ],
)
def test_an_override_is_shown_without_its_secret(text: str, shown: str) -> None:
    assert override(text) == shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:SET}", "a $b \"c\" 'd'"),
        ("x ${oc.env:SET}/${oc.env:UNSET, two words }y", "x a $b \"c\" 'd'/two wordsy"),
        ("${oc.env:UNSET,'a `\"b\"'}", 'a `"b"'),
    ],
)
def test_a_word_of_a_shell_comes_to_the_value(text: str, value: str) -> None:
    environment = {"SET": "a $b \"c\" 'd'"}
    command = ["bash", "-c", f"printf %s {shell_word(text)}"]
    assert subprocess.run(command, env=environment, capture_output=True).stdout.decode() == value


def test_flags_and_numbers_of_a_command_are_not_taken_for_variables(
    run_with_secrets: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "400")
    monkeypatch.setenv("FAKE_NAME", "save")
    run = run_with_secrets(*HERE, "optim.train_iters=${oc.env:STEPS}", "data.seq_length=400")

    text = shell(run)

    assert "--train-iters 400" in text and "--seq-length 400" in text
    assert '--save ckpt/"${FAKE_NAME:?export it first}" --save-interval 2' in " ".join(text.split())


def test_names_of_secrets_are_known() -> None:
    for name in ("WANDB_API_KEY", "hf_token", "AWS_SECRET_ACCESS", "DB_PASSWORD", "PGPASSWD"):
        assert is_secret(name)
    for name in ("NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "PATH"):
        assert not is_secret(name)
