"""``megasft convert``: Hugging Face folders to Megatron checkpoints and back, and the comparison.

The commands are those of ``python -m checkpoint_convert...``, which also run under torchrun; their
flags are defined there alone.
"""

import typer

convert_app = typer.Typer(
    help="Convert Hugging Face folders to Megatron checkpoints and back.", no_args_is_help=True
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@convert_app.command("hf-to-megatron", context_settings=_PASS_ON, add_help_option=False)
def hf_to_megatron(context: typer.Context) -> None:
    """Write a checkpoint that any parallel layout loads, with the model's Megatron flags."""
    # Imported here: torch takes seconds, and `megasft --help` should not.
    from checkpoint_convert.hf_to_megatron import main
    from megasft.run import forward_worker

    raise typer.Exit(main(context.args, worker=forward_worker.__name__, prog=context.command_path))


@convert_app.command("megatron-to-hf", context_settings=_PASS_ON, add_help_option=False)
def megatron_to_hf(context: typer.Context) -> None:
    """Write a Hugging Face folder from a checkpoint that training saved."""
    from checkpoint_convert.megatron_to_hf import main
    from megasft.run import forward_worker

    raise typer.Exit(main(context.args, worker=forward_worker.__name__, prog=context.command_path))


@convert_app.command("verify", context_settings=_PASS_ON, add_help_option=False)
def verify(context: typer.Context) -> None:
    """Compare a checkpoint with a Hugging Face folder: tensors, configuration, files, logits."""
    from checkpoint_convert.verify.__main__ import main
    from megasft.run import forward_worker

    raise typer.Exit(main(context.args, worker=forward_worker.__name__, prog=context.command_path))
