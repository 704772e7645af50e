"""megasft's flags beside Megatron's, what is set for the user, and what is refused.

Every Megatron flag works, because Megatron parses it; ours start with ``--megasft-``. Flags reach
the parser in this order, so that the user has the last word: what a CPU needs, our defaults, the
model's flags written by the conversion, the user's own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.compat import has
from megasft.errors import FlagError
from megasft.files import MODEL_FILE
from megasft.loss.objectives import OBJECTIVES
from megasft.megatron import cpu, flags, freeze, rope
from megasft.packing.pack import DEFAULT_PACKER, KEEP_ORDER, PACKERS
from megasft.store import TokenStore
from megasft.training import best, retention, run_length, saving, validation
from megasft.training.report_arguments import add_report_arguments, check_report
from megasft.training.turn_weights import add_weight_arguments
from megasft.training.unknown_flags import clear_errors

DEFAULT_FLAGS: Final = (
    *("--dataloader-type", "single", "--no-create-attention-mask-in-dataloader"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--ckpt-format", "torch_dist"),
    *("--dist-ckpt-optim-fully-reshardable", "--tokenizer-type", "NullTokenizer"),
    *("--eval-interval", "1000"),  # Megatron 0.19 divides by it, and has no default
    *("--eval-iters", "0"),  # an evaluation covers the whole validation store
)
"""Megatron defaults that do not fit fine-tuning: its dropout is 0.1, and its optimizer checkpoint
loads only at the layout that saved it."""

LOCAL_SPEC_FLAGS: Final = (
    *("--transformer-impl", "local", "--attention-backend", "unfused"),
    *("--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--no-rope-fusion"),
    *("--no-masked-softmax-fusion",),
)
"""Layers and kernels Megatron has without Transformer Engine and Apex."""

ATTENTION_CHOICES: Final = ("auto", "te", "ring", "all_gather", "sdpa", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--megasft-`` flags; Megatron calls this ``extra_args_provider``."""
    group = parser.add_argument_group("megasft", "supervised fine-tuning on packed rows")
    # Paths stay strings: Megatron saves its flags in checkpoints and loads plain types only.
    group.add_argument(
        "--megasft-data",
        nargs="+",
        metavar="STORE",
        help="token stores made by `megasft build` with one tokenizer, read as one",
    )
    group.add_argument(
        "--megasft-mixture",
        metavar="FILE",
        help="which samples are trained how often and in which stages: YAML or JSON, see "
        "megasft/mixture.py; OpenSFT's ratio file is one. Without it each sample is trained once "
        "an epoch",
    )
    group.add_argument(
        "--megasft-valid-data",
        nargs="+",
        metavar="STORE",
        help="stores that are evaluated whole every --eval-interval steps; each of several also "
        "logs its own loss, as 'lm loss NAME validation', by the name of its folder or by that "
        "given as NAME=STORE",
    )
    group.add_argument(
        "--megasft-hf",
        metavar="CKPT",
        help="folder written by `megasft convert hf-to-megatron`: gives the model's flags, and the "
        "weights to start from (--pretrained-checkpoint) unless --load holds a checkpoint",
    )
    group.add_argument(
        "--megasft-loss",
        choices=sorted(OBJECTIVES),
        default="turn",
        help="what the loss is the mean of over the global batch (default: turn)",
    )
    group.add_argument(
        "--megasft-dft-alpha",
        type=float,
        default=0.0,
        metavar="A",
        help="weight each label by A * p + 1 - A, p its own probability; 0 is plain cross entropy, "
        "1 is dynamic fine-tuning as published (default: 0)",
    )
    group.add_argument(
        "--megasft-attention",
        choices=ATTENTION_CHOICES,
        default="auto",
        help="te: Transformer Engine; ring: keys travel round the context-parallel ranks; "
        "all_gather: they are gathered, fewer messages and more memory; sdpa: gathered, torch's "
        "scaled_dot_product_attention; reference: gathered, dense float32, slow. auto is te with "
        "--transformer-impl transformer_engine, else ring",
    )
    group.add_argument(
        "--megasft-align-tokens",
        type=int,
        default=8,
        metavar="N",
        help="pad every document to a multiple of N, and of what context parallelism needs "
        "(2 x CP). Rows depend on it, so the default gives the same rows on every layout up to "
        "CP 4 and a run can resume on another one (default: 8)",
    )
    group.add_argument(
        "--megasft-rope-scaling",
        metavar="JSON",
        help="rope_parameters of a Hugging Face configuration, for scaled rope that Megatron's own "
        "flags cannot say: linear, llama3 with factors other than Llama 3.1's, yarn; the "
        "conversion writes it",
    )
    group.add_argument(
        "--megasft-no-audit",
        action="store_true",
        help="train on when the units Megatron reduced are not those of the global batch's rows; "
        "without it such a step stops the run",
    )
    group.add_argument(
        "--megasft-packer",
        choices=tuple(PACKERS),
        default=DEFAULT_PACKER,
        help="balanced: rows that cost alike and hold about as many samples; best_fit: the fewest "
        "rows, long samples here and short ones there; sequential: neighbours share a row; none: a "
        f"row for each sample, the rest of it padding (default: {DEFAULT_PACKER})",
    )
    group.add_argument(
        "--megasft-no-balance",
        action="store_true",
        help="train the rows of a global batch where they come; without it they are dealt to "
        "data-parallel ranks and micro-batches by cost, so that ranks end together; the loss is "
        "the same",
    )
    group.add_argument(
        "--megasft-cost-window",
        type=int,
        default=0,
        metavar="W",
        help="sort rows by cost over W neighbouring global batches, so that the rows of a batch "
        "cost alike where dealing them is not enough. This changes which rows make a batch (long "
        "documents meet long ones), and --global-batch-size stays what it is for the whole run; "
        "0 leaves batches random (default: 0)",
    )
    group.add_argument(
        "--megasft-packings",
        type=int,
        default=1,
        metavar="N",
        help="pack the samples anew for each of N epochs, so that equally long ones change their "
        "rows; after N epochs the first packing comes again (default: 1, the same rows each epoch)",
    )
    group.add_argument(
        "--megasft-plan-cache",
        metavar="DIR",
        help="where row plans are kept (default: row_plans in the store)",
    )
    for subject in (run_length, freeze, retention, best):
        subject.add_arguments(group)
    add_weight_arguments(group)
    add_report_arguments(group)
    return parser


def help_text() -> str:
    """Return the help of our flags, then that of Megatron's.

    Megatron 0.19's own ``--help`` fails: some of its texts hold a bare ``%``, which argparse takes
    for a format. Those are printed as they stand.
    """
    ours = argparse.ArgumentParser(
        prog="torchrun ... -m megasft.pretrain_sft",
        usage="%(prog)s <Megatron flags> --megasft-data STORE --calculate-per-token-loss ...",
        description="Fine-tune with Megatron's own training loop on packed rows.",
        add_help=False,
    )
    add_arguments(ours)
    megatron = argparse.ArgumentParser(usage="Megatron's own flags", add_help=False)
    flags.add_flags(megatron)
    for action in megatron._actions:
        try:
            _ = (action.help or "") % (vars(action) | {"prog": megatron.prog})
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")
    return ours.format_help() + "\n" + megatron.format_help()


def assemble_argv(user_argv: Sequence[str]) -> list[str]:
    """Put everything that is set for the user before the user's own flags.

    Raises:
        FlagError: ``--megasft-hf`` names a folder without a model file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--megasft-hf", type=Path)
    early.add_argument("--pretrained-checkpoint")
    early.add_argument("--transformer-impl")
    known, _ = early.parse_known_args(list(user_argv))
    argv: list[str] = [*DEFAULT_FLAGS]
    if cpu.is_needed():
        argv += [*cpu.CPU_FLAGS, *LOCAL_SPEC_FLAGS]
    elif known.transformer_impl is None and not has("transformer_engine"):
        argv += LOCAL_SPEC_FLAGS
    if known.megasft_hf:
        argv += _model_flags(known.megasft_hf)
        if known.pretrained_checkpoint is None:
            argv += ["--pretrained-checkpoint", str(known.megasft_hf)]
    return [*argv, *user_argv]


def _model_flags(folder: Path) -> list[str]:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise FlagError(
            f"--megasft-hf {folder} has no {MODEL_FILE}; make the folder with "
            f"`megasft convert hf-to-megatron --hf HF_DIR --output {folder}`"
        )
    return [str(flag) for flag in orjson.loads(path.read_bytes())["flags"]]


def check(args: Any) -> list[str]:
    """Refuse flags that would make the loss something else than its name says.

    Returns:
        What there is to warn of, in sentences.

    Raises:
        FlagError: With the fact and the remedy.
    """
    if args.megasft_data is None:
        raise FlagError("--megasft-data STORE is missing; make a store with `megasft build`")
    if args.seq_length is None:
        raise FlagError("--seq-length N is missing: the tokens of a packed row")
    if not args.calculate_per_token_loss:
        raise FlagError(
            f"without --calculate-per-token-loss Megatron divides every micro-batch by its own "
            f"count, so the {args.megasft_loss} mean would not be global; add the flag"
        )
    if not 0.0 <= args.megasft_dft_alpha <= 1.0:
        raise FlagError(f"--megasft-dft-alpha is {args.megasft_dft_alpha}; it must lie in [0, 1]")
    _check_packing(args)
    if args.rampup_batch_size is not None:
        raise FlagError(
            "--rampup-batch-size is parsed and ignored by Megatron 0.19; give "
            "--step-batch-size-schedule, as '0:16 1B:32' (from 1B tokens on 32 rows)"
        )
    if args.phase_transition_iterations:
        raise FlagError(
            "--phase-transition-iterations: Megatron counts rows from 0 again behind a transition, "
            "so the run would begin its first epoch anew; drop it"
        )
    without_effect = {
        "--sft": args.sft,
        "--data-path": args.data_path,
        "--mock-data": args.mock_data,
        "--train-data-path": args.train_data_path,
        "--valid-data-path": args.valid_data_path,
        "--full-validation": args.full_validation,
        "--multiple-validation-sets": args.multiple_validation_sets,
        "--validation-set-names": args.validation_set_names,
    }
    given = [flag for flag, value in without_effect.items() if value]
    if given:
        raise FlagError(
            f"{', '.join(given)} and megasft's data exclude each other; drop it, rows come from "
            "--megasft-data and --megasft-valid-data"
        )
    if args.eval_iters:
        raise FlagError(
            f"--eval-iters {args.eval_iters} would have no effect: every evaluation covers the "
            "whole of --megasft-valid-data; drop it"
        )
    if args.dataloader_type not in (None, "single"):
        raise FlagError(
            f"--dataloader-type {args.dataloader_type} would shuffle the row plan once more; drop "
            "it, the plan is shuffled by --seed each epoch"
        )
    rope.from_flags(args)
    check_report(args)
    freeze.check(args)
    retention.check(args.megasft_keep_last, args.save, retain_interval=args.save_retain_interval)
    best.check(args, validation.named_stores(args.megasft_valid_data))
    saving.check(args)
    _check_attention(args)
    return _what_depends_on_the_layout(args)


def _check_packing(args: Any) -> None:
    if args.megasft_align_tokens < 1:
        raise FlagError(f"--megasft-align-tokens is {args.megasft_align_tokens}; the least is 1")
    if args.megasft_packings < 1:
        raise FlagError(f"--megasft-packings is {args.megasft_packings}; the least is 1")
    if args.megasft_packings > 1 and args.megasft_packer in KEEP_ORDER:
        raise FlagError(
            f"--megasft-packings {args.megasft_packings} has no effect with --megasft-packer "
            f"{args.megasft_packer}, which makes the same rows each time; drop one of the two"
        )
    if args.megasft_cost_window < 0 or args.megasft_cost_window == 1:
        raise FlagError(
            f"--megasft-cost-window is {args.megasft_cost_window}; sorting takes two global "
            "batches at least, 0 switches it off"
        )


def _what_depends_on_the_layout(args: Any) -> list[str]:
    """Name the options of mixture-of-experts models whose definition is one of a layout."""
    if not args.num_experts:
        return []
    found, balancing = [], args.moe_router_load_balancing_type
    if "global_aux_loss" in ([balancing] if isinstance(balancing, str) else balancing):
        found.append(
            "--moe-router-load-balancing-type global_aux_loss counts tokens over the micro-batches "
            "so far, so its gradient depends on data parallelism and accumulation; aux_loss does "
            "not at one --micro-batch-size"
        )
    if args.moe_expert_capacity_factor is not None:
        found.append(
            f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor} drops tokens by what "
            "else is on their rank, so the loss depends on the layout; without it no token is "
            "dropped"
        )
    return found


def _check_attention(args: Any) -> None:
    wants_te, has_te_spec = args.megasft_attention == "te", flags.uses_te_spec(args)
    if has_te_spec and not has("transformer_engine"):
        raise FlagError(
            "--transformer-impl transformer_engine, and Transformer Engine is not installed; "
            "pip install megasft[te], or pass --transformer-impl local"
        )
    if wants_te and not has_te_spec:
        raise FlagError(
            "--megasft-attention te needs --transformer-impl transformer_engine; on a CPU use ring"
        )


def set_vocabulary(args: Any, store: TokenStore) -> None:
    """Take the vocabulary from the store when no model flag set it, and check that ids fit.

    Megatron would pad it to a multiple of 128 x TP. The padded rows have logits in every softmax,
    so the loss would depend on TP; the vocabulary is used as it is instead.

    Raises:
        FlagError: The store holds ids the model has no row for, or TP does not divide the rows.
    """
    vocab_size = int(store.meta["vocab_size"])
    if args.vocab_size is None:
        args.vocab_size = vocab_size
    if args.padded_vocab_size is None:
        args.padded_vocab_size = args.vocab_size
    model_size = args.padded_vocab_size
    if model_size % args.tensor_model_parallel_size:
        raise FlagError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} does not divide the "
            f"vocabulary of {model_size:,}, and padded rows would take part in every softmax; "
            "choose a TP that divides it, or give the model itself more rows"
        )
    if vocab_size > model_size:
        raise FlagError(
            f"{store.name} was tokenized with {vocab_size:,} ids, the model has {model_size:,}; "
            "build the store with the model's own tokenizer"
        )


def parse(user_argv: Sequence[str]) -> Any:
    """Parse Megatron's flags and ours; validation comes later (``pretrain_sft``)."""
    args = flags.parse(assemble_argv(user_argv), clear_errors(add_arguments))
    args.megasft_flags = [*user_argv]  # checkpoints carry them, see resume.py
    return args
