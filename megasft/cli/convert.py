"""``megasft convert``: Hugging Face folders to Megatron checkpoints and back."""

from pathlib import Path
from typing import Annotated

import typer

convert_app = typer.Typer(
    help="Convert Hugging Face folders to Megatron checkpoints and back.", no_args_is_help=True
)

Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Map every tensor back and compare bitwise.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier conversion at --output.")
]


@convert_app.command("hf-to-megatron")
def hf_to_megatron(
    hf: Annotated[Path, typer.Option("--hf", metavar="DIR", help="Hugging Face model folder.")],
    output: Annotated[Path, typer.Option("--output", metavar="CKPT", help="Checkpoint folder.")],
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint that any parallel layout loads, with the model's Megatron flags."""
    # Imported here: torch takes seconds, and `megasft --help` should not.
    from checkpoint_convert import cli
    from checkpoint_convert.hf_to_megatron import convert

    cli.show(convert(hf, output, verify=verify, overwrite=overwrite))


@convert_app.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", metavar="CKPT", help="What --save named.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Model folder to write.")],
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="FOLDER",
            help="Converted checkpoint or Hugging Face folder with configuration and tokenizer; "
            "default: the checkpoint itself.",
        ),
    ] = None,
    iteration: Annotated[
        int | None, typer.Option("--iteration", metavar="N", help="Default: the latest.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Default: what config.json says.")
    ] = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face folder from a checkpoint that training saved."""
    from checkpoint_convert import cli
    from checkpoint_convert.config_map import parse_dtype
    from checkpoint_convert.megatron_to_hf import convert

    report = convert(
        checkpoint,
        output,
        like=like,
        iteration=iteration,
        dtype=parse_dtype(dtype, source="--dtype") if dtype else None,
        verify=verify,
        overwrite=overwrite,
    )
    cli.show(report)
