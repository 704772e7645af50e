"""Run a recipe on a few CPU ranks: the same run.yaml, a tiny random model of its family, two steps.

A recipe that nobody can run before the GPUs are there is found wrong when they are. What differs
is in the recipe's ``cpu.yaml``; the data and the tokenizer are the quickstart's.

Usage: python examples/cpu_twin.py examples/qwen3_8b [--output cpu-twin]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

HERE: Final = Path(__file__).resolve().parent
CONVERSATIONS: Final = 60
SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
EXPERTS: Final = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def main() -> int:
    """Make what is missing, train, and say how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("recipe", type=Path, help="folder with run.yaml and cpu.yaml")
    parser.add_argument("--output", type=Path, default=Path("cpu-twin"), help="folder to work in")
    args = parser.parse_args()
    changes = yaml.safe_load((args.recipe / "cpu.yaml").read_text())
    family = changes.pop("family")
    run_dir = args.output / args.recipe.resolve().name
    shutil.rmtree(run_dir, ignore_errors=True)
    chats, tokenizer = make_data(args.output)
    make_model(family, tokenizer, output=run_dir / "hf")
    for store in ("store", "valid-store"):
        megasft("build", "--input", chats, "--tokenizer", tokenizer, "--output", run_dir / store)
    os.environ |= {"HF_DIR": str(run_dir / "hf"), "RUN_DIR": str(run_dir)}
    megasft("train", args.recipe / "run.yaml", *overrides(changes))
    steps = (run_dir / "checkpoints" / "log" / "steps.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, steps) if "loss" in line]
    assert (run_dir / "trained-hf" / "model.safetensors").exists()
    print(f"cpu twin of {run_dir.name}: {len(losses)} steps, exported")
    return 0


def make_data(folder: Path) -> tuple[Path, Path]:
    """Return some of the quickstart's conversations and its tokenizer, made on first use."""
    folder.mkdir(parents=True, exist_ok=True)
    chats, tokenizer = folder / "chats.jsonl", folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        whole, valid = folder / "conversations.jsonl", folder / "valid.jsonl"
        script("1_make_conversations.py", "--output", whole, "--valid", valid)
        script("2_train_tokenizer.py", "--input", whole, "--output", tokenizer)
        lines = whole.read_text().splitlines(keepends=True)
        chats.write_text("".join(lines[:CONVERSATIONS]))
    return chats, tokenizer


def make_model(family: str, tokenizer: Path, *, output: Path) -> None:
    """Write a random model of a family, with the tokenizer's vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes: dict[str, Any] = SIZES | (EXPERTS if "moe" in family else {})
    config = AutoConfig.for_model(
        family,
        vocab_size=len(words),
        max_position_embeddings=131_072,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="float32",
        **sizes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(output)
    words.save_pretrained(output)


def overrides(changes: dict[str, dict[str, Any]]) -> list[str]:
    """Return what `megasft train` takes behind the file."""
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in changes.items()
        for key, value in values.items()
    ]


def script(name: str, *arguments: object) -> None:
    """Run a script of the quickstart."""
    command = [sys.executable, HERE / "quickstart" / name, *arguments]
    subprocess.run(list(map(str, command)), check=True)


def megasft(*arguments: object) -> None:
    """Run a megasft command of this Python's environment."""
    subprocess.run([sys.executable, "-m", "megasft.cli.main", *map(str, arguments)], check=True)


if __name__ == "__main__":
    sys.exit(main())
