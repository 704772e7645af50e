"""A run, ready to be started: the flags of its ranks, what comes before and what after.

Everything a run.yaml can get wrong about flags is found here, before anything is converted or
started. Megatron's own parser reads the whole command at the end, so a command that is printed is
one that it accepts.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megasft.errors import ConversionError, FlagError
from megasft.launch import prepare, written
from megasft.launch.catalog import LAUNCH, OWN_KEYS, SECTIONS, Catalog
from megasft.launch.config import Setting, read
from megasft.launch.prepare import Conversion
from megasft.launch.settings import LAUNCH_HELP, Launch, complete, rank_environment
from megasft.launch.written import Hidden

MODULE: Final = "megasft.pretrain_sft"
RESUME: Final = ("auto", "never")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run.yaml and its overrides come to.

    Attributes:
        argv: Flags of ``python -m megasft.pretrain_sft``.
        environment: Of the ranks, beside that of the process that starts them.
        settings: As they were given, interpolations resolved.
        overrides: As they were given on the command line, but for secrets.
        hidden: Values that are not to be seen in what is written or printed.
        save: Where checkpoints go.
        converted: What ``--megasft-hf`` names.
        conversion: What has to be there before the ranks start, unless it is already.
        export: What is made of the last checkpoint.
    """

    config: Path
    launch: Launch
    argv: tuple[str, ...]
    environment: dict[str, str]
    settings: tuple[Setting, ...]
    overrides: tuple[str, ...]
    hidden: Hidden
    save: Path | None
    converted: Path | None
    conversion: Conversion | None
    export: Conversion | None

    @property
    def log_dir(self) -> Path:
        """Where all that the ranks print is kept."""
        launch = self.launch
        base = self.save / "logs" if self.save else Path("logs")
        base = Path(launch.log_dir) if launch.log_dir else base
        # Nodes may share the file system, and each reads its own ranks' logs after a failure.
        is_one_of_many = launch.backend == "torchrun" and launch.nnodes > 1
        return base / f"node{launch.this_node}" if is_one_of_many else base


def resolve(config: Path, overrides: Sequence[str]) -> Run:
    """Read and check a run.

    Args:
        config: The file.
        overrides: ``section.key=value``.

    Raises:
        FlagError: Of the file, a key, a value, or of flags that do not go together.
        ConversionError: The model cannot be expressed in Megatron's flags.
    """
    settings = read(config, overrides)
    hidden = Hidden.of(settings, os.environ)
    try:
        return _resolved(config, overrides, settings, hidden)
    except (FlagError, ConversionError) as error:
        raise type(error)(hidden.message(str(error))) from None


def _resolved(
    config: Path, overrides: Sequence[str], settings: Sequence[Setting], hidden: Hidden
) -> Run:
    from megasft.training import arguments

    by_name = {setting.name: setting for setting in settings}
    launch = _launch(settings)
    # A flag may stand in any section.
    save = _path(next((setting for setting in settings if setting.key == "save"), None))
    model = _Model.read(by_name, save)
    preset = [*arguments.DEFAULT_FLAGS, *model.flags]
    argv = _argv(settings, Catalog(preset))
    # The folder that --megasft-hf will name may not be there yet: its flags stand for it.
    args = _accept([*model.flags, *argv])
    argv += model.argv + _resume(by_name.get("checkpoint.resume"), args, launch)
    if launch.backend == "local":
        # A login node may lack the GPUs and packages of the nodes that compute, so that what
        # depends on these is left to the ranks there.
        arguments.check(args)
    return Run(
        config=config,
        launch=launch,
        argv=tuple(argv),
        environment=rank_environment(launch, args, os.environ),
        settings=tuple(settings),
        overrides=tuple(map(written.override, overrides)),
        hidden=hidden,
        save=save,
        converted=model.converted,
        conversion=model.conversion,
        export=_export(by_name, save, model),
    )


def _launch(settings: Iterable[Setting]) -> Launch:
    import torch

    from megasft.megatron import cpu

    tree = OmegaConf.structured(Launch)
    for setting in settings:
        if setting.section != LAUNCH or setting.key not in LAUNCH_HELP:
            continue  # an unknown key is the catalog's to name
        try:
            tree = OmegaConf.merge(tree, {setting.key: setting.value})
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise FlagError(f"{setting.place}: {setting.name}: {reason}") from error
    launch = OmegaConf.to_object(tree)
    assert isinstance(launch, Launch)
    complete(launch, os.environ, num_gpus=0 if cpu.is_needed() else torch.cuda.device_count())
    return launch


def _argv(settings: Iterable[Setting], catalog: Catalog) -> list[str]:
    """Turn settings into flags; each error names the setting's line."""
    argv: list[str] = []
    first: dict[str, Setting] = {}
    for setting in settings:
        if setting.section not in SECTIONS:
            end = catalog.nearest_section(setting.section)
            raise FlagError(f"{setting.place}: unknown section {setting.section}{end}")
        if (setting.section, setting.key) in OWN_KEYS:
            continue
        if setting.section == LAUNCH and setting.key in LAUNCH_HELP:
            continue
        try:
            spelling = catalog.find(setting.section, setting.key)
            flags = catalog.flags(spelling, setting.value)
        except FlagError as error:
            raise FlagError(f"{setting.place}: {setting.name}: {error}") from None
        if (other := first.setdefault(spelling.action.dest, setting)) is not setting:
            raise FlagError(
                f"{setting.place}: {setting.name} sets {spelling.option}, which {other.name} "
                f"({other.place}) sets already; drop one of them"
            )
        argv += flags
    # The only thing the loss function works with; false is left to the checks, which say why.
    return argv if "calculate_per_token_loss" in first else [*argv, "--calculate-per-token-loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The model as ``model.hf`` names it.

    Attributes:
        source: Folder that is named, where it is a Hugging Face folder.
        flags: Megatron's flags for the model.
    """

    source: Path | None = None
    converted: Path | None = None
    conversion: Conversion | None = None
    flags: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        return [] if self.converted is None else ["--megasft-hf", str(self.converted)]

    @classmethod
    def read(cls, settings: Mapping[str, Setting], save: Path | None) -> _Model:
        """Look at the folder; a converted checkpoint is used as it is."""
        setting = settings.get("model.hf")
        folder = _path(setting)
        if folder is None or setting is None:
            return cls()
        if (flags := prepare.converted_flags(folder)) is not None:
            return cls(converted=folder, flags=flags)
        cache = _path(settings.get("model.cache")) or (save.parent if save else None)
        if cache is None:
            raise FlagError(
                f"{setting.place}: model.hf {folder} has to be converted, and there is neither "
                "model.cache nor checkpoint.save to say where the result is kept; give one"
            )
        flags = prepare.model_flags(folder, setting.place)
        output = cache / prepare.cache_name(folder)
        conversion = Conversion(source=folder, output=output, is_verified=_verify(settings))
        return cls(source=folder, converted=output, conversion=conversion, flags=flags)


def _resume(setting: Setting | None, args: Any, launch: Launch) -> list[str]:
    """Return ``--load`` where the run is to go on from its own checkpoints."""
    resume = "auto" if setting is None else setting.value
    if resume not in RESUME:
        place = "" if setting is None else f"{setting.place}: "
        raise FlagError(f"{place}checkpoint.resume is {resume}; it is {' or '.join(RESUME)}")
    if resume == "never" and args.load:
        raise FlagError(f"checkpoint.resume never and load {args.load} exclude each other")
    is_saved = args.save and (args.save_interval or args.megasft_save_epochs)
    is_kept = is_saved and args.load in (None, args.save)
    if launch.max_restarts and (not is_kept or resume == "never"):
        raise FlagError(
            f"launch.max_restarts {launch.max_restarts} needs checkpoint.save and save_interval, "
            "checkpoint.resume auto, and no other checkpoint.load; otherwise each restart begins "
            "where this start did"
        )
    is_auto = resume == "auto" and args.save and not args.load
    return ["--load", args.save] if is_auto else []


def _export(settings: Mapping[str, Setting], save: Path | None, model: _Model) -> Conversion | None:
    from checkpoint_convert import origin

    setting = settings.get("checkpoint.export_hf")
    if setting is None or setting.value is False:
        return None
    if save is None or model.converted is None:
        missing = "checkpoint.save" if save is None else "model.hf"
        raise FlagError(f"{setting.place}: checkpoint.export_hf needs {missing}, which is missing")
    is_default = setting.value is True
    output = save.with_name(f"{save.name}-hf") if is_default else Path(str(setting.value))
    if (reason := origin.foreign(output, save)) is not None:
        raise FlagError(
            f"{setting.place}: checkpoint.export_hf {output} exists and {reason}; move it away, or "
            "name another folder"
        )
    return Conversion(
        source=save, output=output, like=model.converted, is_verified=_verify(settings)
    )


def _verify(settings: Mapping[str, Setting]) -> bool:
    setting = settings.get("model.verify")
    if setting is not None and not isinstance(setting.value, bool):
        raise FlagError(f"{setting.place}: model.verify is {setting.value!r}; it is true or false")
    return setting is None or setting.value


def _accept(argv: Sequence[str]) -> Any:
    """Let Megatron's own parser read all flags, and return them."""
    from megasft.training import arguments

    return arguments.parse(argv)


def program(name: str) -> str:
    """Return how to call a program of this Python's environment from a shell."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    is_on_path = found is not None and Path(found).resolve() == beside.resolve()
    return name if is_on_path or not beside.exists() else str(beside)


def _path(setting: Setting | None) -> Path | None:
    if setting is None:
        return None
    if not isinstance(setting.value, str):
        raise FlagError(f"{setting.place}: {setting.name} is {setting.value!r}; it is a path")
    return Path(setting.value)
