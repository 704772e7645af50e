"""The ``megasft`` command: its sub-commands, and what an error looks like.

The command files import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

from megasft.cli import (
    build,
    convert,
    doctor,
    inspect,
    lint,
    mix,
    plan,
    plot,
    prove,
    resume_check,
    spikes,
    trace,
    train,
)
from megasft.errors import MegasftError

app = typer.Typer(
    name="megasft",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# One line a command, in the order of the road: a function of its name, or a Typer app where it has
# sub-commands.
app.command("mix")(mix.mix)
app.command("build")(build.build)
app.command("lint")(lint.lint)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.add_typer(convert.convert_app, name="convert")
app.command("doctor", context_settings=doctor.PASS_ON)(doctor.doctor)
app.command("train")(train.train)
app.command("resume-check", context_settings=doctor.PASS_ON)(resume_check.resume_check)
app.command("plot")(plot.plot)
app.command("spikes")(spikes.spikes)
app.command("trace")(trace.trace)
app.command("prove")(prove.prove)


@app.callback()
def megasft() -> None:
    """Supervised fine-tuning on Megatron-Core.

    **1.** make a token store from conversations, once:

    `megasft build --input chats.jsonl --tokenizer ./Qwen3-0.6B --output store`

    (several sources at rates of their own: `megasft mix` before, or `--megasft-mixture` in 3.)

    **2.** look at it, above all at what is trained:

    `megasft inspect store --html store.html`

    (what will a run see, and what will bite? `megasft plan store --seq-length 4096 --dp 8`)

    **3.** train on it with any Megatron flags:

    `torchrun -m megasft.pretrain_sft --megasft-data store ...`

    or as one file: `megasft train run.yaml` (what is wrong with it? `megasft doctor run.yaml`)

    **4.** look at the run: `megasft plot ckpt/run`, and at the step where the loss jumped:

    `megasft spikes ckpt/run --step 812`

    **what did step 812 train?**

    `megasft trace store --step 812 --seq-length 4096 --global-batch-size 64`

    **does a checkpoint go on where it was, on another layout?**

    `megasft resume-check ckpt/run --context-parallel-size 4`

    **proof:** the same loss and gradients on every layout, on this machine:

    `megasft prove --max-ranks 4`
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a fault of the user's is one message on stderr and exit code 1."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="megasft")
    except MegasftError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, soft_wrap=True, highlight=False).print(message)
        sys.exit(1)


if __name__ == "__main__":
    main()
