"""A byte-level BPE of 512 ids with a chat template, made in milliseconds: no test needs the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2."""

_TEXT: Final = """
system user assistant tool You are a helpful assistant. You are a careful teacher of numbers.
How many clips did she sell altogether in April and May? She sold half as many clips in May.
Natalia sold clips to 48 of her friends, and then she sold 24 more. The answer is 72 clips.
What is the capital of France? The capital of France is Paris. Who are you? I am a language model
trained by researchers to answer questions. Hello there, hello world! Have a nice day! You too!
Let us think step by step. First we add the numbers, then we multiply the result by three and
divide it by two. If a train leaves the station at noon and travels sixty miles an hour, how far
does it travel before the evening? Because the question asks for miles, we count hours first.
Write a function that returns the sum of two numbers. def add(first, second): return first + second
The quick brown fox jumps over the lazy dog while seven wizards mix strange potions with zeal.
Water boils at one hundred degrees, freezes at zero, and covers most of the surface of the planet.
"""


def make_tokenizer(
    folder: Path,
    *,
    vocab_size: int = 512,
    chat_template: str = CHATML,
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS,
    eos: str = "<|im_end|>",
    pad: str = "<|endoftext|>",
) -> Path:
    """Save a tokenizer folder that ``AutoTokenizer.from_pretrained`` loads.

    Args:
        folder: Made if it is not there.
        vocab_size: ``len(tokenizer)``, exactly; what the text cannot fill is ``<|unused_3|>`` etc.
        chat_template: Jinja source.
        special_tokens: They get the first ids, in this order.
        eos: One of the special tokens.
        pad: One of the special tokens; may be the eos.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT.splitlines(), trainer)
    bpe.add_tokens([f"<|unused_{i}|>" for i in range(bpe.get_vocab_size(), vocab_size)])
    assert bpe.get_vocab_size() == vocab_size, "vocab_size must hold 256 bytes and the specials"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=[t for t in special_tokens if t not in (eos, pad)],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder
