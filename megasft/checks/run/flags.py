"""Flags that are missing, have no effect or contradict each other, apart from layout and rows.

``training/arguments.check`` refuses what would change the meaning of the loss; this adds what
Megatron would only say in an assertion, after everything is loaded, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from megasft.checks.run.finding import Hit
from megasft.checks.run.parallel import flag_of
from megasft.training import resume

if TYPE_CHECKING:
    from megasft.checks.run.subject import Subject

MODEL_SIZES: Final = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def missing(subject: Subject) -> Iterator[Hit]:
    """Find flags without which Megatron ends in a bare assertion or a TypeError."""
    args = subject.args
    absent = [flag_of(name) for name in MODEL_SIZES if getattr(args, name) is None]
    if absent:
        yield Hit(
            f"{', '.join(absent)} missing: the model's sizes",
            "pass --megasft-hf CKPT, a folder made by `megasft convert hf-to-megatron`, which "
            "gives all of them",
        )
    if args.micro_batch_size is None:
        yield Hit("--micro-batch-size N is missing: the rows a rank computes at once", "add 1")
    if args.lr is None and not args.skip_train:
        yield Hit("--lr is missing", "add it; fine-tuning of all weights takes 1e-6 to 2e-5")
    if args.save is not None and not (args.save_interval or args.megasft_save_epochs):
        yield Hit(
            f"--save {args.save} without --save-interval: Megatron needs both",
            "add --save-interval N, in iterations, or --megasft-save-epochs E",
        )


def contradicting(subject: Subject) -> Iterator[Hit]:
    """Find pairs of flags that Megatron asserts about in fewer words."""
    args = subject.args
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        yield Hit(
            f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}", "swap them, or drop --min-lr"
        )
    if args.bf16 and args.fp16:
        yield Hit("--bf16 and --fp16 exclude each other", "drop one")
    if args.train_iters is not None and args.train_samples is not None:
        yield Hit("--train-iters and --train-samples exclude each other", "drop one")
    if args.lr_warmup_fraction is not None and (args.lr_warmup_iters or args.lr_warmup_samples):
        yield Hit(
            "--lr-warmup-fraction and --lr-warmup-iters (or -samples) exclude each other",
            "drop one",
        )
    if args.train_iters and args.lr_warmup_iters >= args.train_iters:
        yield Hit(
            f"--lr-warmup-iters {args.lr_warmup_iters} is not below --train-iters "
            f"{args.train_iters}: the rate would never be reached",
            "warm up for some 3 % of the run (--lr-warmup-fraction 0.03)",
        )
    if args.recompute_granularity == "full" and args.recompute_method is None:
        yield Hit(
            "--recompute-granularity full without --recompute-method",
            "add --recompute-method uniform --recompute-num-layers 1",
        )
    if args.recompute_granularity != "full" and args.recompute_method is not None:
        yield Hit(
            f"--recompute-method {args.recompute_method} has no effect without "
            "--recompute-granularity full",
            "add it, or drop the method",
        )


def dropout(subject: Subject) -> Iterator[Hit]:
    """Find dropout, which makes two layouts compute different things."""
    args = subject.args
    given = [
        f"--{name}-dropout {getattr(args, f'{name}_dropout'):g}"
        for name in ("attention", "hidden")
        if getattr(args, f"{name}_dropout")
    ]
    if given:
        yield Hit(
            f"{' and '.join(given)}: pretrained models are fine-tuned without, and a run gives "
            "other numbers on each layout",
            "drop it, the default here is 0",
        )


def loss_scale(subject: Subject) -> Iterator[Hit]:
    """Find loss scaling where there is nothing to scale, and fp16's large start."""
    args = subject.args
    if args.loss_scale and not args.fp16:
        yield Hit(f"--loss-scale {args.loss_scale:g} without --fp16", "drop it")
    if args.fp16 and not args.loss_scale:
        yield Hit(
            f"--fp16 starts with a loss scale of {args.initial_loss_scale:g}, and skips some steps "
            "until it fits",
            "use --bf16 where the GPU has it, or --initial-loss-scale 65536",
        )


def random_weights(subject: Subject) -> Iterator[Hit]:
    """Find a run that starts from nothing."""
    args = subject.args
    if not args.pretrained_checkpoint and resume.find(args) is None:
        empty = f"--load {args.load} holds no checkpoint, and " if args.load else ""
        yield Hit(
            f"training starts from random weights: {empty}neither --megasft-hf nor "
            "--pretrained-checkpoint is given",
            "pass --megasft-hf CKPT, made by `megasft convert hf-to-megatron`",
        )


def no_clipping(subject: Subject) -> Iterator[Hit]:
    """Find a run that lets single batches throw it off."""
    if not subject.args.clip_grad:
        yield Hit("--clip-grad 0: gradients are not clipped", "use --clip-grad 1.0")
