"""Where numbers grow past what counts them: positions of the model, and 32-bit integers.

Megatron adds units up in int32, and kernels that index logits with 32-bit offsets read elsewhere
without a word once a micro-batch has 2**31 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import orjson

from megasft.checks.run.finding import Hit
from megasft.checks.run.stores import model_folder
from megasft.training.arguments import MODEL_FILE

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject

INT32: Final = 2**31


def row_over_positions(subject: Subject) -> Iterator[Hit]:
    """Find rows longer than the model's positions, which Megatron asserts of the whole row."""
    args = subject.args
    most = args.max_position_embeddings
    if most is None or args.seq_length is None or args.seq_length <= most:
        return
    why = (
        "with rope it limits nothing else: positions start anew in each document"
        if args.position_embedding_type == "rope"
        else "its embedding has that many rows; only rope goes further"
    )
    yield Hit(
        f"--seq-length {args.seq_length} is above --max-position-embeddings {most}, and Megatron "
        f"refuses that ({why})",
        f"add --max-position-embeddings {args.seq_length} behind --megasft-hf, or shorten rows"
        if args.position_embedding_type == "rope"
        else f"use --seq-length {most} or less",
        {"seq_length": args.seq_length, "max_position_embeddings": most},
    )


def document_over_positions(subject: Subject) -> Iterator[Hit]:
    """Find documents longer than the model was trained on."""
    most = model_positions(subject.args)
    plan, lengths = subject.data.train.plan, subject.data.train.store.tokens.lengths
    placed = lengths[plan.rows.samples]
    if most is None or int(placed.max(initial=0)) <= most:
        return
    longer = int((placed > most).sum())
    yield Hit(
        f"{longer:,} documents are longer than the {most:,} positions the model was made for; the "
        f"longest has {int(placed.max()):,} tokens",
        "scale its rope in the Hugging Face config before converting (rope_parameters, yarn for "
        "one), or build with --max-tokens",
        {"documents": longer, "positions": most},
    )


def model_positions(args: Any) -> int | None:
    """Return the longest text the model was made for, scaled rope counted; None if not known."""
    folder = model_folder(args)
    if folder is None:
        return None
    config = orjson.loads((folder / MODEL_FILE).read_bytes()).get("hf_config", {})
    config = config.get("text_config") or config
    found = config.get("max_position_embeddings")
    return None if found is None else int(found)


def too_many_units(subject: Subject) -> Iterator[Hit]:
    """Find global batches whose units do not fit the int32 Megatron adds them in."""
    args, plan = subject.settled, subject.data.train.plan
    per_row = {"turn": plan.turns, "sample": plan.labelled_samples, "token": plan.labels}
    most = int(per_row[args.megasft_loss].max(initial=0)) * int(args.global_batch_size)
    if most >= INT32:
        yield Hit(
            f"a global batch of {args.global_batch_size} rows may hold {most:,} {args.megasft_loss}"
            f" units, and Megatron counts them in 32 bits (up to {INT32 - 1:,})",
            "lower --global-batch-size",
            {"units": most},
        )


def too_many_logits(subject: Subject) -> Iterator[Hit]:
    """Find micro-batches of more logits than 32-bit offsets reach."""
    args = subject.settled
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    num = tokens * args.padded_vocab_size // args.tensor_model_parallel_size
    if num >= INT32:
        yield Hit(
            f"a micro-batch has {num:,} logits on a GPU ({tokens:,} tokens x "
            f"{args.padded_vocab_size:,} ids / TP {args.tensor_model_parallel_size}), more than "
            f"the {INT32:,} that kernels with 32-bit offsets reach",
            "raise --context-parallel-size or --tensor-model-parallel-size, or lower "
            "--micro-batch-size",
            {"logits": num},
        )
