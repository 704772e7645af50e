"""Ask a Hugging Face model one question and print its answer, decoded greedily.

With ``--expect`` the exit code tells whether the answer holds a text, for scripts to check.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MAX_NEW_TOKENS = 64


def answer(folder: Path, question: str) -> str:
    """Return what the model in a folder answers, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.generate(
            **prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    """Read the flags, ask, and compare where a text is expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--question", required=True, help="what to ask, as a user's message")
    parser.add_argument("--expect", default="", metavar="TEXT", help="text the answer must hold")
    args = parser.parse_args()
    logging.disable_progress_bar()
    reply = answer(args.model, args.question)
    print(f"question: {args.question}")
    print(f"answer: {reply}")
    if args.expect not in reply:
        print(f"the answer does not hold the expected text: {args.expect}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
