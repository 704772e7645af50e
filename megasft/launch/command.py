"""The commands of a run as one would type them: convert, torchrun, export.

What is printed is what is run: the torchrun backend starts ``torchrun_command`` itself, and the
batch script of Slurm holds the same words.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from omegaconf import OmegaConf

from megasft.files import MODEL_FILE
from megasft.launch import prepare
from megasft.launch.run import MODULE, Run, program
from megasft.training.saving import COMPLETE

if TYPE_CHECKING:
    from megasft.launch.written import Setting

BOTH_STREAMS: Final = "3"
WIDTH: Final = 100


def torchrun_command(run: Run) -> list[str]:
    """Return the command that starts this node's ranks and stays with them."""
    launch = run.launch
    ranks = launch.nproc_per_node
    meeting = ["--standalone"]
    if not launch.is_alone:
        meeting = [
            *("--nnodes", str(launch.nnodes)),
            *("--rdzv-backend", launch.rdzv_backend, "--rdzv-endpoint", launch.endpoint),
            *("--rdzv-id", launch.rdzv_id),
        ]
        if launch.rdzv_conf:
            meeting += ["--rdzv-conf", launch.rdzv_conf]
        if launch.rdzv_backend == "static":
            meeting += ["--node-rank", str(launch.this_node)]
        if launch.local_addr:
            meeting += ["--local-addr", launch.local_addr]
    # Everything each rank says is kept; Megatron talks on the first rank, and the loss on the last.
    logs = ["--log-dir", str(run.log_dir), "--tee", BOTH_STREAMS, "--role", "rank"]
    if ranks > 2:
        logs += ["--local-ranks-filter", f"0,{ranks - 1}"]
    size = ["--nproc-per-node", str(ranks), "--max-restarts", str(launch.max_restarts)]
    return [program("torchrun"), *meeting, *size, *logs, "-m", MODULE, *run.argv]


def before(run: Run) -> list[str] | None:
    """Return the command that makes the converted checkpoint, where one has to be made."""
    if run.conversion is None:
        return None
    words = prepare.convert_command(run.conversion)[3:]
    return [program("megasft"), "convert", "hf-to-megatron", *words]


def after(run: Run) -> list[str] | None:
    """Return the command that exports the last checkpoint."""
    if run.export is None:
        return None
    paths = prepare.export_command(run.export)[3:]
    return [program("megasft"), "convert", "megatron-to-hf", *paths]


def unless_incomplete(run: Run) -> str:
    """Return what stands before an export: a run that was told to end early also ends with 0."""
    assert run.export is not None
    return f"test ! -f {run.hidden.word(str(run.export.source / COMPLETE))} ||\n  "


def exports(run: Run) -> list[str]:
    """Return the variables of ``launch.env`` that hide something, as a shell assigns them."""
    return [run.hidden.assignment(name, "") for name in run.hidden.environment]


def started(run: Run) -> list[str]:
    """Return the command that was typed, and what has to be exported before it or a kept file."""
    typed = shlex.join(["megasft", "train", str(run.config), *run.overrides])
    needed = " ".join(run.hidden.needed)
    return [typed, *([f"not kept here, to be exported before: {needed}"] if needed else [])]


def shell(run: Run) -> str:
    """Return the whole run as a shell script that works when pasted."""
    lines = ["set -e"]
    quote = run.hidden.word
    # By export, because the arguments of `env` are seen by everyone on the machine.
    lines += [f"export {assignment}" for assignment in exports(run)]
    if (convert := before(run)) is not None:
        assert run.conversion is not None
        there = quote(str(run.conversion.output / MODEL_FILE))
        lines.append(f"test -f {there} ||\n  {folded(convert, quote=quote, indent='    ')}")
    environment = [
        f"{k}={v}" for k, v in run.environment.items() if k not in run.hidden.environment
    ]
    start = (["env", *environment] if environment else []) + torchrun_command(run)
    lines.append(folded(start, quote=quote))
    if (export := after(run)) is not None:
        lines.append(f"{unless_incomplete(run)}{folded(export, quote=quote, indent='    ')}")
    return "\n".join(lines) + "\n"


def folded(
    command: Sequence[str], *, quote: Callable[[str], str] = shlex.quote, indent: str = "  "
) -> str:
    r"""Quote a command and break it before flags, with a backslash at each end of line.

    Example:
        >>> folded(["run", "--name", "a b"])
        "run --name 'a b'"
    """
    words: list[str] = []
    for word in command:
        if words and not word.startswith("-"):
            words[-1] += f" {quote(word)}"
        else:
            words.append(quote(word))
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append(f"{indent}{word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def resolved_yaml(settings: Iterable[Setting]) -> str:
    """Return settings as a run.yaml of their own, section by section, without values of variables.

    A reference to the environment stays one, so that it is looked up when the file is started.
    """
    tree: dict[str, dict[str, Any]] = {}
    for setting in settings:
        tree.setdefault(setting.section, {})[setting.key] = setting.written
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def as_comment(text: str) -> str:
    """Return lines that a shell and YAML pass over."""
    return "".join(f"# {line}\n" for line in text.splitlines())
