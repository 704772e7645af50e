"""Convert a Hugging Face folder into a checkpoint that any parallel layout loads.

``python -m checkpoint_convert.hf_to_megatron --hf DIR --output CKPT`` writes::

    CKPT/release/            Megatron torch_dist checkpoint
    CKPT/latest_checkpointed_iteration.txt
    CKPT/megasft_model.json  Megatron's flags for this model, and its configuration
    CKPT/hf/                 everything of DIR that is not weights, for the way back
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson

from checkpoint_convert import hf_folder, megatron_checkpoint, tensor_map
from checkpoint_convert.cli import Report, add_shared_arguments, exit_code
from checkpoint_convert.config_map import Model, read_model
from checkpoint_convert.output_folder import require_free, whole_folder
from megasft.errors import ConversionError

MODEL_FILE: Final = "megasft_model.json"
SIDE_FOLDER: Final = "hf"


def convert(hf: Path, output: Path, *, verify: bool = True, overwrite: bool = False) -> Report:
    """Convert a Hugging Face folder.

    Args:
        hf: Folder with ``config.json`` and safetensors.
        output: Checkpoint folder; appears whole or not at all.
        verify: Map every tensor back and compare bitwise.
        overwrite: Replace an earlier conversion.

    Raises:
        ConversionError: The model cannot be expressed, or the output is in the way.
    """
    if hf.resolve() == output.resolve():
        raise ConversionError(f"--hf and --output are both {hf}; choose another --output")
    require_free(output, overwrite=overwrite, marker=MODEL_FILE)
    model = read_model(hf)
    tensors = hf_folder.read_tensors(hf)
    placed = tensor_map.to_megatron(tensors, model, verify=verify)
    with whole_folder(output) as folder:
        megatron_checkpoint.write(folder, placed, model)
        names = hf_folder.copy_side_files(hf, folder / SIDE_FOLDER)
        _write_model_file(folder, model, names)
    return Report(
        source=hf,
        output=output,
        family_name=model.family_name,
        dtypes=" ".join(sorted({str(t.data.dtype).removeprefix("torch.") for t in placed})),
        num_hf_tensors=len(tensors),
        num_megatron_tensors=len(model.rules),
        num_parameters=sum(tensor.data.numel() for tensor in placed),
        num_bytes=sum(tensor.data.nbytes for tensor in placed),
        is_verified=verify,
        flags=model.flags,
    )


def _write_model_file(folder: Path, model: Model, side_files: Sequence[str]) -> None:
    content = {
        "family": model.family_name,
        "flags": list(model.flags),
        "vocab_size": model.vocab_size,
        "tokenizer_files": [name for name in side_files if name in hf_folder.TOKENIZER_FILES],
        "hf_config": model.hf_config,
    }
    (folder / MODEL_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoint_convert.hf_to_megatron",
        description="Convert a Hugging Face folder into a Megatron checkpoint for any layout.",
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--output", type=Path, required=True, metavar="CKPT", help="checkpoint")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    return exit_code(
        lambda: convert(args.hf, args.output, verify=not args.no_verify, overwrite=args.overwrite)
    )


if __name__ == "__main__":
    sys.exit(main())
