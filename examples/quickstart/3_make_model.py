"""Make a small Qwen3 model with random weights, as a Hugging Face folder like any other.

It stands for the model one would download: the following steps see a folder with a config, a
tokenizer and safetensors. Four layers and four heads (two of keys) can be cut by TP 2 and PP 2.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging


def make_model(tokenizer_folder: Path, *, seed: int) -> Qwen3ForCausalLM:
    """Return a float32 model with the tokenizer's vocabulary and random weights."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)  # transformers draws the weights from the global generator
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def main() -> None:
    """Read the flags, make the model, save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights")
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = make_model(args.tokenizer, seed=args.seed)
    model.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, random")


if __name__ == "__main__":
    main()
