"""Train a small byte-level BPE tokenizer with a ChatML template on the conversations.

A vocabulary of 2,048 is enough for a demo and keeps the tiny model's output layer cheap; a real
run takes the tokenizer of the model it tunes. Byte-level means that no text is out of vocabulary.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD: Final = "<|endoftext|>"
START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_MULTIPLE: Final = 128
"""Tensor parallelism cuts the vocabulary evenly; this divides by every usual TP, unpadded."""


def texts(path: Path) -> Iterator[str]:
    """Yield what the tokenizer will meet: each message as its role line and its content."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield f"{message['role']}\n{message['content']}\n"


def train_tokenizer(conversations: Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of exactly ``vocab_size`` tokens, the three special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(conversations), trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"{conversations} yields only {tokenizer.get_vocab_size():,} tokens and not "
            f"{vocab_size:,}; ask for fewer with --vocab-size"
        )
    # Only what a model must never write as text is special; `pad` and `eos` differ on purpose.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped


def main() -> None:
    """Read the flags, train the tokenizer, save it as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="conversations, one per line")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, the special included")
    args = parser.parse_args()
    if args.vocab_size % VOCAB_MULTIPLE:
        parser.error(f"--vocab-size {args.vocab_size} is not a multiple of {VOCAB_MULTIPLE}")
    tokenizer = train_tokenizer(args.input, vocab_size=args.vocab_size)
    tokenizer.save_pretrained(args.output)
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts(args.input))
    print(f"{args.output}: {len(tokenizer):,} tokens in the vocabulary, {num_tokens:,} in the text")


if __name__ == "__main__":
    main()
