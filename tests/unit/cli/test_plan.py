import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megasft.cli.planned import DEFAULT_ALIGN_TOKENS, DEFAULT_SEED
from megasft.packing.balance import LLAMA_8B
from megasft.training import datasets, row_order
from tests.stores import random_samples, sample, write_store
from tests.unit.checkpoint_convert import published

from .conftest import Seen

Megasft = Callable[..., Seen]
LONGEST = 90
RUN = ("--seq-length", 64, "--dp", 2, "--global-batch-size", 4)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", random_samples(120, seed=3, longest=LONGEST))
    return tmp_path / "store"


def dear_attention(folder: Path) -> Path:
    """A model whose long documents cost much more than its short ones."""
    small = {"hidden_size": 4, "intermediate_size": 4, "vocab_size": 4}
    small |= {"num_attention_heads": 2, "head_dim": 128}
    folder.mkdir()
    (folder / "config.json").write_bytes(orjson.dumps(published.LLAMA_3_8B | small))
    return folder


def training_log(store: Path, caplog: pytest.LogCaptureFixture, **changes: Any) -> list[str]:
    """What a run of Llama 3 8B on this store says before its first step."""
    args = {
        "megasft_data": [str(store)],
        "megasft_mixture": None,
        "megasft_valid_data": None,
        "megasft_align_tokens": DEFAULT_ALIGN_TOKENS,
        "megasft_packer": "balanced",
        "megasft_packings": 1,
        "megasft_cost_window": 0,
        "megasft_no_balance": False,
        "megasft_plan_cache": None,
        "megasft_turn_weights": "use",
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "seq_length": 64,
        "seed": DEFAULT_SEED,
        "vocab_size": None,
        "padded_vocab_size": None,
        "global_batch_size": 4,
        "eval_global_batch_size": 4,
        "data_parallel_size": 2,
        "micro_batch_size": 1,
        "rampup_batch_size": None,
        "step_batch_size_schedule": None,
        "phase_transition_iterations": None,
    }
    llama = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128}
    llama |= {"group_query_attention": True, "num_query_groups": 8, "swiglu": True}
    llama |= {"ffn_hidden_size": 14_336, "num_experts": None}
    flags = SimpleNamespace(**(args | llama | changes))
    data = datasets.open_data(flags)
    flags.padded_vocab_size = published.LLAMA_3_8B["vocab_size"]
    assert row_order.cost_of(flags) == LLAMA_8B
    caplog.clear()
    with caplog.at_level(logging.INFO, "megasft"):
        datasets.announce(flags, data)
    return caplog.messages


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ((), {}),
        (
            ("--cp", 8, "--packer", "best_fit", "--packings", 2, "--seed", 5),
            {
                "context_parallel_size": 8,
                "megasft_packer": "best_fit",
                "megasft_packings": 2,
                "seed": 5,
            },
        ),
        (
            ("--align-tokens", 4, "--cost-window", 3, "--micro-batch-size", 2),
            {"megasft_align_tokens": 4, "megasft_cost_window": 3, "micro_batch_size": 2},
        ),
    ],
)
def test_the_numbers_are_those_the_run_logs(
    store: Path,
    megasft: Megasft,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[object, ...],
    changes: dict[str, Any],
) -> None:
    log = training_log(store, caplog, **changes)
    seen = megasft("plan", store, *RUN, *flags)

    assert seen.code == 0
    assert log[0] in seen.out
    (balance,) = (line for line in log if line.startswith("balance: the slowest of 2"))
    after, before, batches = re.findall(r"([\d.]+) times|\((\d+) global", balance)
    assert re.search(rf"slowest rank +{after[0]} times .* {before[0]} times", seen.out)
    assert f"({batches[1]} global batches)" in seen.out
    left_out = re.search(r"^train: (\d+) .* \((\d+) tokens, .* has (\d+); first: (.*)\)", log[-1])
    assert left_out is not None
    num, tokens, longest = map(int, left_out.groups()[:3])
    told = (
        f"{num:,} samples longer than a row, {tokens:,} tokens; the longest has {longest:,}; first:"
    )
    assert f"{told} {left_out[4]}" in seen.out


def test_a_mixture_is_planned_as_it_is_trained(
    store: Path, megasft: Megasft, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(store.parent / "other", random_samples(30, seed=4))
    mixture = store.parent / "mixture.yaml"
    mixture.write_text(
        "curriculum: sequential\nparts: [{source: other, sample_rate: 2}, {source: store}]"
    )
    both = [str(store), str(store.parent / "other")]
    changes = {"megasft_data": both, "megasft_mixture": str(mixture)}
    log = training_log(store, caplog, **changes)

    seen = megasft("plan", *both, *RUN, "--mixture", mixture)

    assert log[0] in seen.out
    assert " in 2 stages, " in log[0]
    told = [line.split(": ", 1)[1] for line in log if line.startswith("mixture: ")]
    assert len(told) == 2
    assert all(re.search(rf"mixture +{re.escape(line)}", seen.out) for line in told)
    stages = [line.split(": ", 1)[1] for line in log if line.startswith("stage ")]
    assert len(stages) == 2
    assert all(line in seen.out for line in stages)


def test_the_report_has_a_packer_a_line_and_json_holds_the_numbers(
    store: Path, megasft: Megasft
) -> None:
    path, hf = store.parent / "plan.json", dear_attention(store.parent / "hf")
    seen = megasft("plan", store, *RUN, "--model-config", hf, "--json", path)
    ratio = r" +([\d.]+)"
    table = re.findall(
        rf"^([* ]) (\w+) +([\d,]+){ratio} % +(\d+) to (\d+){ratio * 4} *$", seen.out, re.MULTILINE
    )
    numbers = orjson.loads(path.read_bytes())

    assert [row[1] for row in table] == ["balanced", "best_fit", "sequential", "none"]
    assert [row[0] for row in table] == ["*", " ", " ", " "]
    assert table[0][-1] == "1.000"
    assert float(table[3][-1]) > 1.2
    for _, name, *printed in table:
        one = numbers["packers"][name]
        balance, samples = one["balance"], one["samples_per_row"]
        assert balance["before"] > balance["after"] + 0.001
        time = one["epoch_cost"] / numbers["packers"]["balanced"]["epoch_cost"]
        ratios = (one["dearest_over_mean"], balance["after"], balance["before"], time)
        assert printed == [
            *(f"{one['num_rows']:,.0f}", f"{100 * one['padding']:.2f}"),
            *(f"{samples['least']:.0f}", f"{samples['most']:.0f}"),
            *(f"{number:.3f}" for number in ratios),
        ]
    assert numbers["padding"] == pytest.approx(numbers["alignment_padding"] + numbers["gaps"])
    assert "packers" not in megasft("plan", store, *RUN, "--no-compare").out


def test_the_report_says_the_numbers_of_the_json(store: Path, megasft: Megasft) -> None:
    path = store.parent / "plan.json"
    seen = megasft("plan", store, *RUN, "--no-compare", "--json", path)
    numbers = orjson.loads(path.read_bytes())

    spreads = {"samples of a row": numbers["samples_per_row"]}
    spreads |= {f"{name} of a step": spread for name, spread in numbers["steps"].items()}
    for name, spread in spreads.items():
        printed = [f"{spread['least']:.0f}", f"{spread['mean']:.1f}", f"{spread['most']:.0f}"]
        assert re.search(rf"^  {name} +{' +'.join(printed)} *$", seen.out, re.MULTILINE), name
        assert spread["least"] < spread["mean"] < spread["most"]
    assert f"dearest row       {numbers['dearest_row_over_mean']:.3f} times the mean" in seen.out
    assert numbers["model"] == "Llama 3 8B"
    assert {one["name"] for one in numbers["cautions"]} == set(
        re.findall(r"^warning ([\w-]+): ", seen.out, re.MULTILINE)
    )
    assert "too-long" in {one["name"] for one in numbers["cautions"]}


def test_a_small_run_is_told_as_counted_by_eye(tmp_path: Path, megasft: Megasft) -> None:
    """In order: 5 and 6 tokens share a row of 16, then 9 and 3, 8 and 7, 2 and 11; 12 is alone."""
    turns = {n: [(1, n - 2)] for n in (5, 6, 9, 3, 20, 8, 7)}
    turns |= {2: [], 11: [(1, 4), (6, 4)], 12: [(1, 2), (4, 5)]}
    samples = [sample([1] * n, *turns[n]) for n in (5, 6, 9, 3, 20, 8, 7, 2, 11, 12)]
    store = write_store(tmp_path / "store", samples).path
    run = ("--seq-length", 16, "--align-tokens", 2, "--packer", "sequential")
    ranks = ("--dp", 2, "--cp", 1, "--tp", 2, "--pp", 3, "--global-batch-size", 6)

    seen = megasft("plan", store, *run, *ranks)

    told = [" ".join(line.split()) for line in seen.out.splitlines()]
    wanted = """
        rows 5 of 16 tokens
        iterations 0.83 of 6 rows
        turns 10
        tokens 63, of which 41 labels (65.1 %)
        padding 21.25 %: 6.25 % in documents, to multiples of 2; 15.00 % at the end of rows
        samples of a row 1 1.8 2
        dearest row 1.000 times the mean
    """
    for line in filter(None, map(str.strip, wanted.splitlines())):
        assert line in told, seen.out
    assert any(line.startswith("samples 9 of 10 in ") for line in told)
    (of_ranks,) = (line for line in told if line.startswith("ranks "))
    assert of_ranks == (
        "ranks 12 = DP 2 x CP 1 x TP 2 x PP 3; in a step each DP rank trains 3 in micro-batches "
        "of 1 row"
    )


def test_comparing_packers_leaves_the_plan_of_the_run_alone_in_the_store(
    store: Path, megasft: Megasft
) -> None:
    assert megasft("plan", store, *RUN).code == 0
    assert len(list((store / "row_plans").iterdir())) == 1


def test_costs_are_those_of_the_model_given(store: Path, megasft: Megasft) -> None:
    hf = dear_attention(store.parent / "hf")
    run = (*RUN, "--packer", "sequential", "--json", store.parent / "plan.json")
    dearest = []
    for flags in ((), ("--model-config", hf)):
        assert megasft("plan", store, *run, *flags).code == 0
        numbers = orjson.loads((store.parent / "plan.json").read_bytes())
        dearest.append(numbers["dearest_row_over_mean"])
    assert dearest[1] - 1 > 2 * (dearest[0] - 1)
    seen = megasft("plan", store, *run, "--model-config", hf)
    assert re.search(rf"costs +those of {re.escape(str(hf))}", seen.out)
    assert "no --model-config says" in megasft("plan", store, *run).out


def test_a_run_that_cannot_start_fails_and_says_why(store: Path, megasft: Megasft) -> None:
    seen = megasft("plan", store, "--seq-length", 64, "--dp", 3, "--global-batch-size", 4)
    assert seen.code == 1
    assert "error indivisible-batch: a global batch of 4 rows is not a multiple of 3" in seen.out
    assert "iterations" in seen.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seq-length", 60), "60 is not a multiple of 8, which TP 1 x CP 1 .* set it to 64"),
        (("--seq-length", 72, "--cp", 8), "TP 1 x CP 8 .* set it to 80"),
        (
            ("--seq-length", 72, "--tp", 16, "--sequence-parallel"),
            "TP 16 x CP 1 and documents aligned to 8 tokens need; set it to 80",
        ),
        (("--seq-length", 64, "--packer", "x"), "--packer x is not one of balanced, best_fit"),
        (
            ("--seq-length", 64, "--packer", "none", "--packings", 2),
            "--packings 2 has no effect with --packer none",
        ),
        (("--seq-length", 64, "--model-config", "nowhere"), "nowhere/config.json cannot be read"),
        (("--seq-length", 64, "--json", "no/where.json"), "--json no/where.json cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(
    store: Path, megasft: Megasft, flags: tuple[object, ...], message: str
) -> None:
    seen = megasft("plan", store, *flags)
    assert seen.code == 1
    assert re.search(message, seen.err)


def test_planning_needs_neither_torch_nor_megatron(store: Path) -> None:
    code = (
        "import sys\nfrom megasft.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    flags = [str(value) for value in ("plan", store, *RUN)]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")


def test_a_picture_is_written_when_asked_for(store: Path, megasft: Megasft) -> None:
    path = store.parent / "plan.png"
    seen = megasft("plan", store, *RUN, "--no-compare", "--plot", path)
    assert f"histograms: {path}" in seen.out
    assert path.read_bytes().startswith(b"\x89PNG")
