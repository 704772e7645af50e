"""The other side of `bench_data.py`: conversations to arrow, the way most people write it.

Like OpenSFT it finds an answer as the difference of two rendered prefixes and tokenizes both.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from typing import Any

import psutil  # type: ignore[import-untyped]


def main() -> int:
    """Tokenize one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("output")
    parser.add_argument("tokenizer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--masks", default="prefixes", choices=["prefixes", "offsets"])
    args = parser.parse_args()
    plain_pipeline(args)
    return 0


def plain_pipeline(args: argparse.Namespace) -> None:
    """Load, map and save; print first what the start-up took."""
    import datasets
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(args.tokenizer)
    startup = {"cpu": sum(os.times()[:2]), "seconds": time.time() - psutil.Process().create_time()}
    print("\n" + json.dumps(startup), flush=True)
    function = partial({"prefixes": by_prefixes, "offsets": by_offsets}[args.masks], tokenizer=hf)
    data = datasets.load_dataset("json", data_files=args.file, split="train")
    data = data.map(
        function,
        num_proc=args.processes if args.processes > 1 else None,
        remove_columns=data.column_names,
    )
    data.save_to_disk(args.output)


def by_prefixes(record: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenize a conversation and mask it by the difference of prefixes, each tokenized."""
    messages = record["messages"]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    labels = [-100] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answer = prompt_and_answer(tokenizer, messages, index)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            end = start + len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def by_offsets(record: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Tokenize a conversation once; its prefixes are rendered, but not tokenized."""
    messages = record["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [-100] * len(encoded["input_ids"])
    spans = [
        (len(prompt), len(prompt) + len(answer))
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
        for prompt, answer in [prompt_and_answer(tokenizer, messages, index)]
    ]
    for place, (token, (start, end)) in enumerate(
        zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        if any(a <= start and end <= b for a, b in spans):
            labels[place] = token
    ones = encoded["attention_mask"]
    return {"input_ids": encoded["input_ids"], "labels": labels, "attention_mask": ones}


def prompt_and_answer(tokenizer: Any, messages: list[Any], index: int) -> tuple[str, str]:
    """Render up to an answer and up to its end; return the first and what the second adds."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    prompt = render(messages[:index], add_generation_prompt=True)
    return prompt, render(messages[: index + 1])[len(prompt) :]


if __name__ == "__main__":
    sys.exit(main())
