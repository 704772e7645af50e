"""Flags that are missing, have no effect or contradict each other, apart from layout and rows.

``training/arguments.check`` refuses what would change the meaning of the loss; this adds what
Megatron would only say in an assertion, after everything is loaded, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from megasft.checks.engine import Finding, Severity, rule, step
from megasft.checks.run.subject import Stage, Subject
from megasft.training import resume

MODEL_SIZES: Final = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "micro_batch_size"),
    *("global_batch_size", "seq_length", "num_layers", "hidden_size", "num_attention_heads"),
    *("ffn_hidden_size", "num_query_groups", "world_size", "megasft_align_tokens"),
)
_STEPS = ("train_iters", "train_samples", "log_interval", "eval_interval")


def flag_of(name: str) -> str:
    """Return the flag of one of Megatron's attributes.

    Example:
        >>> flag_of("seq_length")
        '--seq-length'
    """
    return "--" + name.replace("_", "-")


def sizes_are_positive(args: Any) -> bool:
    """Say whether other rules may divide by the sizes."""
    return all((getattr(args, name) is None or getattr(args, name) > 0) for name in _SIZES)


@rule("missing-flag", Severity.ERROR, Stage.FLAGS, theme="flags")
def missing(subject: Subject) -> Iterator[Finding]:
    """A flag is missing that Megatron cannot do without.

    It would end in a bare assertion or a TypeError.
    """
    args = subject.args
    absent = [flag_of(name) for name in MODEL_SIZES if getattr(args, name) is None]
    if absent:
        yield Finding(
            f"{', '.join(absent)} missing: the model's sizes",
            "pass --megasft-hf CKPT, a folder made by `megasft convert hf-to-megatron`, which "
            "gives all of them",
        )
    if args.micro_batch_size is None:
        yield Finding("--micro-batch-size N is missing: the rows a rank computes at once", "add 1")
    if args.lr is None and not args.skip_train:
        yield Finding("--lr is missing", "add it; fine-tuning of all weights takes 1e-6 to 2e-5")
    if args.save is not None and not (args.save_interval or args.megasft_save_epochs):
        yield Finding(
            f"--save {args.save} without --save-interval: Megatron needs both",
            "add --save-interval N, in iterations, or --megasft-save-epochs E",
        )


REFUSED_FLAG = step(
    "refused-flag",
    Stage.FLAGS,
    theme="flags",
    meaning="flags that would change what the loss means, or have no effect",
)


@rule("contradicting-flags", Severity.ERROR, Stage.FLAGS, theme="flags")
def contradicting(subject: Subject) -> Iterator[Finding]:
    """Two flags exclude each other."""
    args = subject.args
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        yield Finding(
            f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}", "swap them, or drop --min-lr"
        )
    if args.bf16 and args.fp16:
        yield Finding("--bf16 and --fp16 exclude each other", "drop one")
    if args.train_iters is not None and args.train_samples is not None:
        yield Finding("--train-iters and --train-samples exclude each other", "drop one")
    if args.lr_warmup_fraction is not None and (args.lr_warmup_iters or args.lr_warmup_samples):
        yield Finding(
            "--lr-warmup-fraction and --lr-warmup-iters (or -samples) exclude each other",
            "drop one",
        )
    if (args.train_iters or 0) > 0 and args.lr_warmup_iters >= args.train_iters:
        yield Finding(
            f"--lr-warmup-iters {args.lr_warmup_iters} is not below --train-iters "
            f"{args.train_iters}: the rate would never be reached",
            "warm up for some 3 % of the run (--lr-warmup-fraction 0.03)",
        )
    if args.recompute_granularity == "full" and args.recompute_method is None:
        yield Finding(
            "--recompute-granularity full without --recompute-method",
            "add --recompute-method uniform --recompute-num-layers 1",
        )
    if args.recompute_granularity != "full" and args.recompute_method is not None:
        yield Finding(
            f"--recompute-method {args.recompute_method} has no effect without "
            "--recompute-granularity full",
            "add it, or drop the method",
        )


@rule("size-not-positive", Severity.ERROR, Stage.FLAGS, theme="flags")
def not_positive(subject: Subject) -> Iterator[Finding]:
    """A size, or a number of steps, below 1."""
    for name in _SIZES if subject.args.skip_train else (*_SIZES, *_STEPS):
        value = getattr(subject.args, name)
        if value is not None and value < 1:
            yield Finding(f"{flag_of(name)} is {value}", "the least is 1", {name: value})


@rule("dropout", Severity.WARNING, Stage.FLAGS, theme="flags")
def dropout(subject: Subject) -> Iterator[Finding]:
    """Dropout is on.

    With it two layouts compute different things.
    """
    args = subject.args
    given = [
        f"--{name}-dropout {getattr(args, f'{name}_dropout'):g}"
        for name in ("attention", "hidden")
        if getattr(args, f"{name}_dropout")
    ]
    if given:
        yield Finding(
            f"{' and '.join(given)}: pretrained models are fine-tuned without, and a run gives "
            "other numbers on each layout",
            "drop it, the default here is 0",
        )


@rule("loss-scale", Severity.WARNING, Stage.FLAGS, theme="flags")
def loss_scale(subject: Subject) -> Iterator[Finding]:
    """Loss scaling without fp16, or fp16 with a large start."""
    args = subject.args
    if args.loss_scale and not args.fp16:
        yield Finding(f"--loss-scale {args.loss_scale:g} without --fp16", "drop it")
    if args.fp16 and not args.loss_scale:
        yield Finding(
            f"--fp16 starts with a loss scale of {args.initial_loss_scale:g}, and skips some steps "
            "until it fits",
            "use --bf16 where the GPU has it, or --initial-loss-scale 65536",
        )


@rule("no-clipping", Severity.WARNING, Stage.FLAGS, theme="flags")
def no_clipping(subject: Subject) -> Iterator[Finding]:
    """Gradients are not clipped."""
    if not subject.args.clip_grad:
        yield Finding("--clip-grad 0: gradients are not clipped", "use --clip-grad 1.0")


@rule("random-weights", Severity.WARNING, Stage.FLAGS, theme="flags")
def random_weights(subject: Subject) -> Iterator[Finding]:
    """Training starts from random weights."""
    args = subject.args
    if not args.pretrained_checkpoint and resume.find(args) is None:
        empty = f"--load {args.load} holds no checkpoint, and " if args.load else ""
        yield Finding(
            f"training starts from random weights: {empty}neither --megasft-hf nor "
            "--pretrained-checkpoint is given",
            "pass --megasft-hf CKPT, made by `megasft convert hf-to-megatron`",
        )
