"""A run.yaml comes to one command, which Megatron's parser accepts, or to one error."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_convert import origin
from megasft.errors import ConversionError, FlagError
from megasft.files import MODEL_FILE
from megasft.launch.command import folded, resolved_yaml, shell
from megasft.launch.run import Run, resolve
from megasft.training import arguments
from megasft.training.saving import COMPLETE
from tests.unit.launch.conftest import RUN_YAML, write_hf

ROOT = Path(__file__).resolve().parents[3]
ON_TWO_NODES = ["launch.backend=torchrun", "launch.nnodes=2", "launch.master_addr=h"]


def test_the_flags_are_those_of_the_file_and_of_the_model(resolved: Callable[..., Run]) -> None:
    run = resolved("parallel.tensor_model_parallel_size=2", "optim.lr=2e-3")

    args: Any = arguments.parse(run.argv)
    assert (args.seq_length, args.lr, args.tensor_model_parallel_size) == (96, 2e-3, 2)
    assert (args.hidden_size, args.swiglu, args.megasft_data) == (64, True, ["store"])
    assert args.load == args.save == "ckpt/run"  # checkpoint.resume: auto
    assert args.pretrained_checkpoint == "converted"
    assert args.calculate_per_token_loss, "which nobody need say"
    given = resolved("loss.calculate_per_token_loss=true").argv
    assert given.count("--calculate-per-token-loss") == 1


def test_the_first_start_may_come_from_another_checkpoint(resolved: Callable[..., Run]) -> None:
    assert "--load" not in resolved("checkpoint.resume=never").argv
    elsewhere = resolved("checkpoint.save=null", "optim.save=there")
    assert elsewhere.save == Path("there") and elsewhere.argv[-2:] == ("--load", "there")
    argv = resolved("checkpoint.load=other").argv
    assert argv[argv.index("--load") + 1] == "other" and argv.count("--load") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lerning_rate=1"], r"override optim.lerning_rate=1: optim.lerning_rate: unknown"),
        (["model.seq_length=5"], r"run.yaml:8: data.seq_length sets .*model.seq_length \(override"),
        (["data.megasft_data=x"], r"data.megasft_data sets --megasft-data, which data.store"),
        (["model.no_rope_fusion=true", "model.rope_fusion=false"], "which model.no_rope_fusion"),
        (["optimizer.lr=1"], r"unknown section optimizer; did you mean optim\?"),
        (["optim.lr=fast"], r"override optim.lr=fast: optim.lr: invalid float value: 'fast'"),
        (["launch.nproc_per_node=two"], r"launch.nproc_per_node: Value 'two'"),
        (["launch.nproc_per_node=null"], "launch.nproc_per_node: not given; say how many ranks"),
        (["launch.nnodes=2"], "launch.backend local is this machine alone"),
        (["launch.nnodes=0"], "there is at least one node"),
        (["launch.backend=torchrun", "launch.nnodes=2"], "launch.master_addr is missing"),
        (
            ON_TWO_NODES,
            "launch.node_rank is missing, and none of NODE_RANK, SLURM_NODEID",
        ),
        (
            [*ON_TWO_NODES, "launch.node_rank=2"],
            "with launch.nnodes 2 it is 0 to 1",
        ),
        (["launch.backend=slurm", "launch.master_addr=h"], "launch.master_addr would have no"),
        (["launch.max_restarts=2", "checkpoint.save=null"], "max_restarts 2 needs checkpoint.save"),
        (["launch.max_restarts=2", "checkpoint.save_interval=null"], "and save_interval"),
        (["launch.max_restarts=2", "checkpoint.load=x"], "no other checkpoint.load"),
        (["checkpoint.resume=maybe"], "checkpoint.resume is maybe; it is auto or never"),
        (["checkpoint.resume=never", "checkpoint.load=x"], "exclude each other"),
        (["checkpoint.export_hf=converted"], "converted exists and was not exported from a"),
        (["checkpoint.export_hf=true", "model.hf=null"], "export_hf needs model.hf"),
        (["model.verify=maybe", "checkpoint.export_hf=x"], "model.verify is 'maybe'; it is true"),
        (["model.hf=3"], "model.hf is 3; it is a path"),
    ],
)
def test_a_wrong_configuration_is_one_error_before_anything_starts(
    resolved: Callable[..., Run], overrides: list[str], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        resolved(*overrides)


def test_a_folder_that_holds_no_model_is_named_with_its_line(resolved: Callable[..., Run]) -> None:
    with pytest.raises(ConversionError, match=r"model.hf: absent is not there; give a Hug"):
        resolved("model.hf=absent")
    fetch = "model.hf: Qwen/Qwen3-8B is not a folder here; .* hf download Qwen/Qwen3-8B --local-dir"
    with pytest.raises(ConversionError, match=fetch):
        resolved("model.hf=Qwen/Qwen3-8B")


OTHERS = {
    "learning_rate": "optim.lr",
    "per_device_train_batch_size": "data.micro_batch_size",
    "gradient_accumulation_steps": r"data.global_batch_size \(the micro-batch size x data-parallel",
    "num_train_epochs": "optim.epochs",
    "max_seq_length": "data.seq_length",
    "output_dir": "checkpoint.save",
    "model_name_or_path": "model.hf",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_name_of_another_tool_is_answered_with_its_key_and_line(
    write_run: Callable[[str], Path], other: str
) -> None:
    with pytest.raises(
        FlagError, match=rf"^run.yaml:9: {other} is not a.*here it is {OTHERS[other]}"
    ):
        resolve(write_run("# top\n" + "\n" * 7 + f"{other}: 3\n"), ())
    within = rf"^run.yaml:2: model.{other}: unknown key {other}; here it is {OTHERS[other]}"
    with pytest.raises(FlagError, match=within):
        resolve(write_run(f"launch: {{nproc_per_node: 1}}\nmodel: {{{other}: 3}}\n"), ())


def test_the_export_of_an_earlier_start_may_be_there(
    resolved: Callable[..., Run], folder: Path
) -> None:
    out = folder / "new"
    out.mkdir()
    (out / "config.json").touch()
    origin.write(out, output=out, checkpoint=folder / "ckpt" / "run", source="of some step")
    assert "--update" in shell(resolved("checkpoint.export_hf=new"))
    with pytest.raises(FlagError, match="exported from another checkpoint, ckpt/run beside it"):
        resolved("checkpoint.export_hf=new", "checkpoint.save=ckpt/other")


def test_a_hugging_face_folder_gives_the_flags_before_it_is_converted(
    write_run: Callable[[str], Path], folder: Path
) -> None:
    write_hf(folder / "hf")
    run = resolve(write_run(RUN_YAML), ["model.hf=hf", "checkpoint.export_hf=true"])

    assert run.conversion is not None and run.export is not None
    assert re.fullmatch(r"ckpt/hf-megatron-[0-9a-f]{12}", str(run.conversion.output))
    assert run.argv[run.argv.index("--megasft-hf") + 1] == str(run.conversion.output)
    assert run.export.output == Path("ckpt/run-hf")
    assert not run.conversion.output.exists()


def test_what_is_printed_is_the_run_when_pasted_into_a_shell(
    resolved: Callable[..., Run], folder: Path
) -> None:
    run = resolved("launch.env.NCCL_DEBUG='IN FO'", "data.store=['a b', \"it's\"]")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    recorder = '#!/bin/bash\nprintf "%s\\0" "$NCCL_DEBUG" "$CUDA_VISIBLE_DEVICES" "$@" > ran\n'
    (bin_folder / "torchrun").write_text(recorder)
    (bin_folder / "torchrun").chmod(0o755)
    # The environment's own torchrun is called by its path unless it is the one on PATH.
    text = re.sub(r"(?m)\S*/torchrun ", "torchrun ", shell(run))

    subprocess.run(
        ["bash", "-c", text],
        check=True,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin"},
        cwd=folder,
    )

    debug, devices, *words = (folder / "ran").read_text().split("\0")[:-1]
    assert (debug, devices) == ("IN FO", "")
    assert words[0] == "--standalone" and words[words.index("--nproc-per-node") + 1] == "2"
    assert tuple(words[words.index("megasft.pretrain_sft") + 1 :]) == run.argv
    assert "it's" in run.argv


def test_a_resolved_run_is_a_run_of_its_own(resolved: Callable[..., Run], folder: Path) -> None:
    run = resolved("optim.lr=7e-3", "launch.env.A=1")
    (folder / "again.yaml").write_text(resolved_yaml(run.settings))

    again = resolve(Path("again.yaml"), ())

    assert (again.argv, again.launch) == (run.argv, run.launch)


@pytest.mark.parametrize("is_complete", [False, True])
def test_the_printed_script_exports_a_complete_run_only(
    resolved: Callable[..., Run], folder: Path, is_complete: bool
) -> None:
    run = resolved("checkpoint.export_hf=new")
    (folder / "ckpt" / "run").mkdir(parents=True)
    if is_complete:
        (folder / "ckpt" / "run" / COMPLETE).write_text("{}")
    for name, text in (("torchrun", "exit 0"), ("megasft", "touch exported")):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    # With a path, or without where they are on PATH.
    text = re.sub(r"(?m)(?<=\s)(\S*/)?(torchrun|megasft) ", rf"{folder}/\2 ", shell(run))

    subprocess.run(["bash", "-c", text], check=True, cwd=folder)

    assert (folder / "exported").exists() == is_complete


def test_each_node_has_a_folder_for_its_logs(resolved: Callable[..., Run]) -> None:
    assert resolved().log_dir == Path("ckpt/run/logs")
    assert resolved("launch.log_dir=l").log_dir == Path("l")
    node = resolved(*ON_TWO_NODES, "launch.node_rank=1", "launch.log_dir=l")
    assert node.log_dir == Path("l/node1")


def test_the_environment_is_what_megatron_asks_for_unless_the_user_chose(
    resolved: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    on_gpus = ("launch.cpu=false", "parallel.tensor_model_parallel_size=2")
    name = "CUDA_DEVICE_MAX_CONNECTIONS"

    def added(*overrides: str) -> dict[str, str]:
        environment = dict(resolved(*overrides).environment)
        assert int(environment.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")) > 600  # a step and a save
        return environment

    assert added() == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert added("launch.cpu=false") == {}
    assert added(*on_gpus) == {name: "1"}
    assert added(*on_gpus, "parallel.use_torch_fsdp2=true") == {}
    assert added(*on_gpus, f"launch.env.{name}=8") == {name: "8"}
    assert added("launch.cpu=false", "launch.max_restarts=1") == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }
    monkeypatch.setenv(name, "32")
    assert added(*on_gpus) == {}


@pytest.mark.parametrize("words", [["a"], ["a", "--b", "c d", "--e", "", "'"], ["x" * 300, "-y"]])
def test_folding_changes_no_word(words: list[str]) -> None:
    text = folded(words * 20)
    assert shlex.split(text.replace("\\\n", "")) == words * 20


def test_the_quickstarts_file_has_the_flags_of_its_script(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both layouts of 4_train.sh, recorded by a torchrun that starts nothing."""
    demo = folder / "demo"
    (demo / "megatron").mkdir(parents=True)
    (folder / "converted" / MODEL_FILE).rename(demo / "megatron" / MODEL_FILE)
    monkeypatch.setenv("DEMO_DIR", str(demo))
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    recorder = (
        '#!/bin/bash\nprintf "%s\\0" "$@" >> ran; printf "\\n" >> ran; echo "[megasft] recorded"\n'
    )
    (bin_folder / "torchrun").write_text(recorder)
    (bin_folder / "torchrun").chmod(0o755)
    script = ROOT / "examples/quickstart/4_train.sh"
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "DEMO_DIR": str(demo)}
    subprocess.run([script], check=True, env=environment, cwd=folder, capture_output=True)
    phases = [line.split("\0")[:-1] for line in (folder / "ran").read_text().splitlines()]
    assert len(phases) == 2
    other = ("tensor_model_parallel_size=null", "context_parallel_size=null")
    pipeline = [f"parallel.{o}" for o in (*other, "pipeline_model_parallel_size=2")]

    for words, layout in zip(phases, (["log.exit_interval=50"], pipeline), strict=True):
        model = [f"model.hf={demo}/megatron"]
        run = resolve(ROOT / "examples/quickstart/run.yaml", [*layout, *model])
        theirs = vars(arguments.parse(words[words.index("megasft.pretrain_sft") + 1 :]))
        ours = vars(arguments.parse(run.argv))
        del ours["megasft_flags"]  # as they were given, in another order
        assert {k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k]} == {}
        assert words[words.index("--nproc-per-node") + 1] == str(run.launch.nproc_per_node)
        assert run.environment["CUDA_VISIBLE_DEVICES"] == ""
