"""``python -m checkpoint_convert.verify --hf DIR --checkpoint CKPT [--hf-out DIR]``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert.verify import TOLERANCE, show, verify
from checkpoint_convert.verify.layouts import parse_layout
from megasft.errors import MegasftError


def parser(*, prog: str) -> argparse.ArgumentParser:
    """Return the command line of the program that is called so."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Compare a Megatron checkpoint with the Hugging Face folder it was converted "
        "from, or to: tensors bit for bit, configuration, files, and the logits of both programs "
        "in float32 on the CPU. Exit code 0: the same model; 1: not, or not comparable.",
    )
    result.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder")
    result.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="CKPT",
        help="converted checkpoint; or what --save named, with the folder converted from it as "
        "--hf",
    )
    result.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    result.add_argument(
        "--hf-out", type=Path, metavar="DIR", help="folder converted back, to be equal to --hf"
    )
    result.add_argument(
        "--no-logits",
        action="store_true",
        help="compare tensors, configuration and files only; what the tensors mean stays unchecked",
    )
    result.add_argument(
        "--layout",
        action="append",
        metavar="SIZES",
        help="parallel sizes of Megatron's model, as in tp2,pp2,ep2; may be repeated (default: "
        "one process, and two of everything the model's sizes divide by)",
    )
    size = result.add_mutually_exclusive_group()
    size.add_argument(
        "--by-layer",
        action="store_true",
        help="compare layer by layer with one in memory, each from Hugging Face's own input "
        "(default: when the float32 model needs more than half of the memory available)",
    )
    size.add_argument("--whole", action="store_true", help="keep the whole model in memory")
    result.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="T",
        help="largest difference of logits, relative to the largest logit or 1 (default: "
        "%(default)g)",
    )
    result.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="where the record goes (default: verification.json in CKPT, and in --hf-out)",
    )
    return result


def main(
    argv: Sequence[str] | None = None,
    *,
    worker: str,
    prog: str = "python -m checkpoint_convert.verify",
) -> int:
    """Parse, verify, print; return the exit code."""
    args = parser(prog=prog).parse_args(argv)
    try:
        verification = verify(
            args.hf,
            args.checkpoint,
            worker=None if args.no_logits else worker,
            hf_out=args.hf_out,
            layouts=[parse_layout(text) for text in args.layout] if args.layout else None,
            by_layer=True if args.by_layer else False if args.whole else None,
            tolerance=args.tolerance,
            manifest=args.manifest,
            iteration=args.iteration,
        )
    except MegasftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    show(verification)
    return 0 if verification.is_ok else 1


if __name__ == "__main__":
    # The program chooses whose model is run, the package does not.
    from megasft.run import forward_worker

    sys.exit(main(worker=forward_worker.__name__))
