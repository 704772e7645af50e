"""Writes a batch script for Slurm and submits it where there is ``sbatch``.

The script starts one torchrun on each node and holds the very command of the other backends, so
that it can be read, kept and submitted by hand. Chosen over a task for each rank, whose ranks Slurm
would have to restart and whose first error nobody would look for. Options of sbatch are those of
``launch.slurm`` under their own long names; megasft knows none of them but the three it sets.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from megasft.errors import FlagError, MissingPackageError
from megasft.files import MODEL_FILE, write_whole
from megasft.launch import command, saved
from megasft.launch.run import Run
from megasft.launch.written import shell_line
from megasft.training.saving import COMPLETE

logger = logging.getLogger(__name__)

TEMPLATE: Final = "sbatch.jinja"
SCRIPT: Final = "run.sbatch"
SET_HERE: Final = ("nodes", "ntasks-per-node")
"""Options that follow from launch.nnodes; in launch.slurm they would say it twice."""
KNOWN_THERE: Final = {
    "--rdzv-endpoint": "$HEAD:$MEETING_PORT",
    "--rdzv-id": "$SLURM_JOB_ID",
}
"""Values of torchrun's that only the job knows, as its shell says them."""
SIGNALS: Final = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Passed on to the ranks, those of ``--signal=USR1@300`` too, which would end torchrun alone."""


def submit(run: Run, environ: Mapping[str, str]) -> int:
    """Write the script beside the checkpoints and submit it, or say how to.

    Raises:
        FlagError: There is no place for the script, or Slurm refuses it.
    """
    text = script(run)
    if run.save is None:
        raise FlagError(
            "launch.backend slurm writes its script into checkpoint.save, which is missing"
        )
    saved.save(run)
    run.log_dir.mkdir(parents=True, exist_ok=True)  # a job without a place for its output dies mute
    path = run.save / SCRIPT
    write_whole(path, text.encode())
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        logger.warning(
            "%s is written and not submitted, because this machine has no sbatch; on one that has: "
            "%s",
            *(path, " ".join(_by_hand(run) or ["sbatch", run.hidden.word(str(path))])),
        )
        return 0
    hidden = [_option(name, value, str) for name, value in _options(run, is_hidden=True)]
    # The job has the environment of sbatch, where a secret given as it is gets its name.
    own = {name: run.environment[name] for name in run.hidden.environment}
    environ = dict(environ) | {n: v for n, v in own.items() if n in run.hidden.needed}
    tested = _call([sbatch, "--test-only", *hidden, str(path)], environ)
    if tested.returncode != 0:
        raise FlagError(f"sbatch --test-only refuses {path}: {tested.stderr.strip()}")
    submitted = _call([sbatch, *hidden, str(path)], environ)
    sys.stdout.write(submitted.stdout)
    sys.stderr.write(submitted.stderr)
    return submitted.returncode


def script(run: Run) -> str:
    """Return the batch script of a run.

    Raises:
        FlagError: An option of ``launch.slurm`` is set by megasft, is no option, or keeps from the
            job what its script needs.
        MissingPackageError: The template is not installed.
    """
    _require_exported(run)
    quote = run.hidden.word
    assignments = [run.hidden.assignment(name, v) for name, v in run.environment.items()]
    convert, export = (_on_one_node(words) for words in (command.before(run), command.after(run)))
    there = run.conversion.output / MODEL_FILE if run.conversion else ""
    return _template().render(
        started=[*command.started(run), *_by_hand(run)],
        options=[_option(name, value) for name, value in _options(run, is_hidden=False)],
        setup=_setup(run) or [_path_line()],
        environment=" ".join(assignments),
        convert=convert and command.folded(convert, quote=quote, indent="    "),
        converted_file=quote(str(there)),
        command=_torchrun(run),
        complete=_complete(run),
        export=export
        and command.unless_incomplete(run) + command.folded(export, quote=quote, indent="    "),
    )


def _complete(run: Run) -> str | None:
    """Return what tells that a job need not be started again; None where none is to be."""
    wants = {key.replace("_", "-"): value for key, value in run.launch.slurm.items()}
    return run.hidden.word(str(run.save / COMPLETE)) if wants.get("requeue") and run.save else None


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    try:
        return environment.get_template(TEMPLATE)
    except jinja2.TemplateNotFound:
        raise MissingPackageError(
            f"megasft is installed without {TEMPLATE}; install it anew"
        ) from None


def _options(run: Run, *, is_hidden: bool) -> list[tuple[str, Any]]:
    """Return options of sbatch: what follows from the run, then ``launch.slurm``.

    Args:
        run: Resolved.
        is_hidden: Those that hold what is not written down. They are given to sbatch itself,
            because a line after ``#SBATCH`` knows no variables.
    """
    given = {str(k).replace("_", "-"): v for k, v in run.launch.slurm.items()}
    twice = [name for name in SET_HERE if name in given]
    if twice:
        raise FlagError(
            f"launch.slurm.{twice[0]} is set by megasft, from launch.nnodes; drop it there"
        )
    chosen: dict[str, Any] = {
        "job-name": run.save.name if run.save else "megasft",
        "nodes": run.launch.nnodes,
        "ntasks-per-node": 1,
        # The shell of the batch script keeps its own directory: paths are relative to it.
        "output": f"{run.log_dir}/slurm-%j.out",
        "open-mode": "append",
    }
    if not run.launch.cpu:
        chosen["gpus-per-node"] = run.launch.nproc_per_node
    return [
        (name, value)
        for name, value in (chosen | given).items()
        if value is not False and run.hidden.is_in(str(value)) == is_hidden
    ]


def _option(name: str, value: Any, quote: Callable[[str], str] = shlex.quote) -> str:
    text = str(value)
    if isinstance(value, (dict, list)) or "\n" in text:
        raise FlagError(f"launch.slurm.{name} is {value!r}; an option of sbatch is one value")
    return f"--{name}" if value is True else f"--{name}={quote(text)}"


def _by_hand(run: Run) -> list[str]:
    """Return the command that submits the script, where it needs more than the script's name."""
    quote = run.hidden.word
    hidden = [_option(name, value, quote) for name, value in _options(run, is_hidden=True)]
    path = SCRIPT if run.save is None else str(run.save / SCRIPT)
    return [" ".join(["sbatch", *hidden, quote(path)])] if hidden else []


def _setup(run: Run) -> list[str]:
    """Return the lines of ``launch.setup``, with variables of the job's own shell."""
    kept = next((s.written for s in run.settings if s.name == "launch.setup"), None)
    if not isinstance(kept, list):
        return run.launch.setup
    return [shell_line(line, text) for line, text in zip(run.launch.setup, kept, strict=True)]


def _require_exported(run: Run) -> None:
    """Check that the job will have the variables its script refers to."""
    exported = run.launch.slurm.get("export")
    if exported is None or "ALL" in (names := str(exported).split(",")):
        return
    missing = [name for name in run.hidden.needed if name not in names]
    if missing:
        raise FlagError(
            f"launch.slurm.export {exported} keeps {', '.join(missing)} from the job, and their "
            "values are not written into its script; add the names, or ALL"
        )


def _torchrun(run: Run) -> str:
    """Return torchrun's command, with what only the job knows left to the shell of each node."""
    torchrun, *words = command.torchrun_command(run)
    # The name alone: what `setup` puts on PATH there decides.
    words = [
        "srun",
        "--kill-on-bad-exit=1",
        Path(torchrun).name,
        "--signals-to-handle",
        SIGNALS,
        *words,
    ]
    for flag, known_there in KNOWN_THERE.items():
        words[words.index(flag) + 1] = f"@{known_there}@"
    text = command.folded(words, quote=run.hidden.word)
    for known_there in KNOWN_THERE.values():
        text = text.replace(shlex.quote(f"@{known_there}@"), f'"{known_there}"')
    return text


def _on_one_node(words: list[str] | None) -> list[str] | None:
    if words is None:
        return None
    return ["srun", "--nodes=1", "--ntasks=1", Path(words[0]).name, *words[1:]]


def _path_line() -> str:
    return f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'


def _call(words: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, env=dict(environ), check=False)
