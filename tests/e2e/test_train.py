"""`megasft train` with the real Megatron: nodes, Ray, a killed rank, and a model at the end.

One store, one tiny Hugging Face model, one run.yaml; every launcher must give the same losses.
"""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.megatron.runs import CPU_ENV, ROOT, free_port, scalars, torchrun
from tests.stores import random_samples, write_store

pytestmark = pytest.mark.slow

STEPS, VOCAB = 8, 256
RUN_YAML = """
launch: {nproc_per_node: 2, cpu: true}
model: {hf: hf, cache: cache, verify: false}
data: {store: store, seq_length: 96, micro_batch_size: 1, global_batch_size: 8, seed: 11}
optim: {train_iters: %d, lr: 1e-3, clip_grad: 1.0}
checkpoint: {save_interval: 2}
log: {log_interval: 1, tensorboard_log_interval: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current directory of all runs."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("train")
    write_store(folder / "store", random_samples(150, seed=5, vocab=VOCAB))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    config = Qwen3Config(**sizes, **heads, max_position_embeddings=512, initializer_range=0.2)
    Qwen3ForCausalLM(config).save_pretrained(folder / "hf")
    (folder / "run.yaml").write_text(textwrap.dedent(RUN_YAML) % STEPS)
    return folder


def start(folder: Path, name: str, *overrides: str, board: str = "") -> subprocess.Popen[str]:
    """Start ``megasft train``; its output is in ``NAME.log``, its losses in ``board`` or NAME."""
    words = ["train", "run.yaml", f"log.tensorboard_dir={board or name}", *overrides]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megasft.cli.main", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=os.environ | CPU_ENV | {"PYTHONPATH": str(ROOT)},
        )


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[int, float]:
    """Losses of a run in one go, on forked ranks that share rows."""
    from checkpoint_convert.hf_to_megatron import convert
    from megasft.launch.run import resolve

    places = {"model.hf": "hf", "model.cache": "straight", "data.store": "store"}
    places |= {"log.tensorboard_dir": "straight"}
    whole = [f"{key}={folder / name}" for key, name in places.items()]
    run = resolve(folder / "run.yaml", (*whole, "parallel.context_parallel_size=2"))
    assert run.converted is not None
    convert(folder / "hf", run.converted)
    torchrun(2, "-m", "megasft.pretrain_sft", *run.argv)
    losses = scalars(folder / "straight")["lm loss"]
    assert sorted(losses) == list(range(1, STEPS + 1))
    told_apart = {round(loss, 3) for loss in losses.values()}
    assert len(told_apart) == STEPS, "losses must tell steps apart for these tests to say anything"
    return losses


@pytest.mark.long
def test_two_nodes_train_the_same_run_on_a_model_that_one_of_them_converts(
    folder: Path, uninterrupted: dict[int, float]
) -> None:
    """On two addresses of this machine, two ranks each; both find no converted model at once."""
    meeting = ("launch.backend=torchrun", "launch.nnodes=2", "launch.master_addr=127.0.0.1")
    port = f"launch.master_port={free_port()}"
    nodes = [
        start(
            folder,
            f"node{rank}",
            *(*meeting, port, f"launch.node_rank={rank}", f"launch.local_addr=127.0.0.{1 + rank}"),
            *("parallel.context_parallel_size=2", "model.cache=nodes-cache"),
            board="nodes",
        )
        for rank in (0, 1)
    ]
    for rank, node in enumerate(nodes):
        assert node.wait(300) == 0, said(folder, f"node{rank}")[-4000:]
    text = said(folder, "node0") + said(folder, "node1")
    assert text.count("once\n") == 1 and text.count("waiting for it") <= 1
    assert len(list((folder / "nodes-cache").glob("hf-megatron-*"))) == 1
    assert scalars(folder / "nodes")["lm loss"] == pytest.approx(uninterrupted, rel=2e-5)


@pytest.mark.long
def test_ranks_on_ray_train_the_same_run(folder: Path, uninterrupted: dict[int, float]) -> None:
    on_ray = start(folder, "ray", "launch.backend=ray", "launch.ray_address=local")

    assert on_ray.wait(300) == 0, said(folder, "ray")[-4000:]
    assert scalars(folder / "ray")["lm loss"] == pytest.approx(uninterrupted, rel=2e-5)


def kill_rank_in_step_5(launch: subprocess.Popen[str], log: Path) -> float:
    """Kill -9 rank 1 once step 4 is logged; return the seconds until rank 0 has ended too."""
    while not re.search(r"iteration +4/", log.read_text()):
        assert launch.poll() is None, log.read_text()[-4000:]
        time.sleep(0.002)
    ranks = {
        process.environ()["RANK"]: process
        for process in psutil.Process(launch.pid).children(recursive=True)
        if "-m megasft.pretrain_sft" in (words := " ".join(process.cmdline()))
        and "torchrun" not in words
        and "RANK" in process.environ()
    }
    ranks["1"].kill()
    began = time.monotonic()
    gone, _ = psutil.wait_procs([ranks["0"]], timeout=90)
    assert gone
    return time.monotonic() - began


FINISHED = (
    *("launch.max_restarts=1", "checkpoint.save=ckpt", "checkpoint.export_hf=new"),
    *("data.valid=valid", "log.eval_interval=2", "checkpoint.keep_last=1"),
    *("checkpoint.best=all", "checkpoint.early_stop=9"),
)


@pytest.fixture(scope="module")
def finished(folder: Path) -> float:
    """A run of which a rank was killed, and which ended; seconds until the other rank ended."""
    write_store(folder / "valid", random_samples(20, seed=6, vocab=VOCAB))
    launch = start(folder, "killed", *FINISHED)
    seconds = kill_rank_in_step_5(launch, folder / "killed.log")
    assert launch.wait(300) == 0, said(folder, "killed")[-4000:]
    return seconds


def test_a_killed_rank_ends_the_other_and_the_restart_repeats_and_skips_nothing(
    folder: Path, uninterrupted: dict[int, float], finished: float
) -> None:
    """Killed in or after step 5, whose checkpoint is that of step 4; exported at the end.

    The losses are those of a run nobody killed, on another layout, so the rows are too. Does not
    cover NCCL, whose ranks wait longer for one that is gone.
    """
    assert finished < 60

    text = said(folder, "killed")
    assert "rank 1 ended with exit code -9; restart 1 of 1, from the last checkpoint" in text
    (last_rank,) = (folder / "ckpt" / "logs").glob("*/attempt_1/1/stdout.log")
    resumed = [int(n) for n in re.findall(r"iteration +(\d+)/", last_rank.read_text())]
    assert resumed[0] in (3, 5, 7) and resumed == list(range(resumed[0], STEPS + 1))
    losses = scalars(folder / "killed")["lm loss"]
    assert set(resumed) <= set(losses)
    assert losses == pytest.approx({step: uninterrupted[step] for step in losses}, rel=2e-5)

    assert (folder / "ckpt" / "run.yaml").is_file() and (folder / "ckpt" / "run.sh").is_file()
    before, after = (weights(folder / name) for name in ("hf", "new"))
    assert before.keys() == after.keys()
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def weights(hf: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(hf / "model.safetensors")


def files_of(*folders: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file, but for what ranks print."""
    paths = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    stats = {str(path): path.stat() for path in paths if "logs" not in path.parts}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.long
def test_a_finished_run_given_again_changes_nothing_and_with_more_steps_goes_on(
    folder: Path, finished: float
) -> None:
    """With the best checkpoint, retention, early stop and export; the export is that of the end."""
    places = folder / "ckpt", folder / "new"
    before, exported = files_of(*places), weights(folder / "new")
    assert any("iter_" in name for name in before) and any("best.json" in n for n in before)

    again = start(folder, "again", *FINISHED, board="killed")
    assert again.wait(300) == 0, said(folder, "again")[-4000:]
    assert files_of(*places) == before
    text = said(folder, "again")
    assert "the run is complete: " in text and "exported already" in text
    assert "is converted already" in text

    longer = start(folder, "longer", *FINISHED, f"optim.train_iters={STEPS + 2}", board="killed")
    assert longer.wait(300) == 0, said(folder, "longer")[-4000:]
    tracker = folder / "ckpt" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(STEPS + 2)
    longest = weights(folder / "new")
    assert not any(np.array_equal(exported[name], longest[name]) for name in exported)
    assert sorted(scalars(folder / "killed")["lm loss"])[-1] == STEPS + 2
