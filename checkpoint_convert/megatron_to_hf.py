"""Convert a checkpoint that training saved into a Hugging Face folder.

``python -m checkpoint_convert.megatron_to_hf --checkpoint CKPT --like FOLDER --output DIR``.
Only the model's tensors are read; the optimizer's, many times as large, stay on disk. Configuration
and tokenizer come from ``--like``: the converted checkpoint training started from, or the Hugging
Face folder itself. A checkpoint made by ``hf_to_megatron`` brings its own.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoint_convert import hf_folder, megatron_checkpoint, tensor_map
from checkpoint_convert.cli import Report, add_shared_arguments, exit_code
from checkpoint_convert.config_map import Model, parse_dtype, read_model
from checkpoint_convert.hf_to_megatron import SIDE_FOLDER
from checkpoint_convert.output_folder import require_free, whole_folder
from megasft.errors import ConversionError


def convert(
    checkpoint: Path,
    output: Path,
    *,
    like: Path | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Report:
    """Convert one iteration of a checkpoint.

    Args:
        checkpoint: What ``--save`` named, or a converted checkpoint.
        output: Hugging Face folder; appears whole or not at all.
        like: Where configuration and tokenizer come from; default: the checkpoint itself.
        iteration: Default: the latest.
        dtype: Default: what the configuration says, or the checkpoint's own where it says nothing.
        verify: Map every tensor back and compare bitwise, before the dtype changes.
        overwrite: Replace an earlier conversion.

    Raises:
        ConversionError: The checkpoint is not whole, or is not the model of the configuration.
    """
    side = side_folder(like, checkpoint=checkpoint)
    if output.resolve() in (checkpoint.resolve(), side.resolve()):
        raise ConversionError(f"--output {output} is where the input lies; choose another")
    require_free(output, overwrite=overwrite, marker="config.json")
    model = read_model(side)
    source = megatron_checkpoint.find_iteration(checkpoint, iteration=iteration)
    stored = megatron_checkpoint.read_model_tensors(source)
    tensors = tensor_map.to_hf(stored, model, verify=verify)
    target_dtype = dtype or model.dtype
    if target_dtype is not None:
        tensors = _rounded(tensors, model, target_dtype)
    with whole_folder(output) as folder:
        hf_folder.write_tensors(tensors, folder)
        hf_folder.copy_side_files(side, folder)
        if dtype is not None:
            hf_folder.set_dtype(folder, dtype)
    return _report(stored, tensors, model, source=source, output=output, is_verified=verify)


def _rounded(
    tensors: Mapping[str, torch.Tensor], model: Model, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Give parameters a dtype; what steers routing is float32 in a bfloat16 model, too."""
    kept = {
        name
        for rule in model.rules
        if rule.is_buffer
        for layer in range(model.num_layers)
        for name in rule.hf_names(layer=layer)
    }
    return {name: t if name in kept else t.to(dtype) for name, t in tensors.items()}


def _report(
    stored: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    model: Model,
    *,
    source: Path,
    output: Path,
    is_verified: bool,
) -> Report:
    return Report(
        source=source,
        output=output,
        family_name=model.family_name,
        dtypes=_dtypes(stored, written),
        num_hf_tensors=len(written),
        num_megatron_tensors=len(stored),
        num_parameters=sum(tensor.numel() for tensor in written.values()),
        num_bytes=sum(tensor.nbytes for tensor in written.values()),
        is_verified=is_verified,
    )


def side_folder(like: Path | None, *, checkpoint: Path) -> Path:
    """Return the folder that holds ``config.json`` and the tokenizer.

    Raises:
        ConversionError: Neither ``like`` nor the checkpoint has one.
    """
    for folder in [checkpoint] if like is None else [like]:
        for candidate in (folder / SIDE_FOLDER, folder):
            if (candidate / "config.json").is_file():
                return candidate
    raise ConversionError(
        f"{like or checkpoint} has neither {SIDE_FOLDER}/config.json nor config.json; give with "
        "--like the converted checkpoint training started from, or the Hugging Face folder"
    )


def _dtypes(stored: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]) -> str:
    before, after = (
        " ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
        for tensors in (stored, written)
    )
    return after if before == after else f"{after}, rounded from {before}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_convert.megatron_to_hf",
        description="Convert a Megatron checkpoint into a Hugging Face folder.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="what --save named"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the latest")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="converted checkpoint or Hugging Face folder with configuration and tokenizer "
        "(default: the checkpoint itself)",
    )
    parser.add_argument("--dtype", help="default: what config.json says")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    return exit_code(
        lambda: convert(
            args.checkpoint,
            args.output,
            like=args.like,
            iteration=args.iteration,
            dtype=parse_dtype(args.dtype, source="--dtype") if args.dtype else None,
            verify=not args.no_verify,
            overwrite=args.overwrite,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
