"""A run, ready to be started: the flags of its ranks, what comes before and what after.

Every key and value of a run.yaml that is no flag's is found here. Megatron's own parser reads the
whole command at the end, once; what it read is examined next (``launch/examination.py``), before
anything is converted or started.
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
from megasft.files import MODEL_FILE
from megasft.launch import prepare, written
from megasft.launch.catalog import LAUNCH, OWN_KEYS, SECTIONS, Catalog
from megasft.launch.config import read
from megasft.launch.prepare import Conversion
from megasft.launch.settings import LAUNCH_HELP, Launch, complete, rank_environment
from megasft.launch.written import Hidden, Setting

MODULE: Final = "megasft.pretrain_sft"
RESUME: Final = ("auto", "never")
PER_TOKEN: Final = "--calculate-per-token-loss"
"""The only thing the loss function works with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run.yaml and its overrides come to.

    Attributes:
        argv: Flags of ``python -m megasft.pretrain_sft``.
        args: What these are parsed to; a model yet to be converted is its Hugging Face folder.
        given: The setting of each flag, and of each key of ``launch`` by its name.
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
    args: Any
    given: dict[str, Setting]
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
    environ = dict(os.environ)  # before torch and Megatron add to it
    hidden = Hidden.of(settings, environ)
    try:
        return _resolved(config, overrides, settings, hidden, environ)
    except (FlagError, ConversionError) as error:
        raise type(error)(hidden.message(str(error))) from None


def _resolved(
    config: Path,
    overrides: Sequence[str],
    settings: Sequence[Setting],
    hidden: Hidden,
    environ: Mapping[str, str],
) -> Run:
    from megasft.training import arguments

    by_name = {setting.name: setting for setting in settings}
    launch = _launch(settings, environ)
    # A flag may stand in any section.
    save = _path(next((setting for setting in settings if setting.key == "save"), None))
    model = _Model.read(by_name, save)
    argv, given = _argv(settings, Catalog([*arguments.DEFAULT_FLAGS, *model.flags]))
    # The folder that --megasft-hf will name may not be there yet: its flags stand for it.
    args = arguments.parse([*model.flags, *argv])
    argv += model.start(args)
    if _resumes(by_name.get("checkpoint.resume"), args, launch):
        argv += ["--load", args.save]
        args.load, given["--load"] = args.save, given["--save"]
    return Run(
        config=config,
        launch=launch,
        argv=tuple(argv),
        args=args,
        given=given,
        environment=rank_environment(launch, args, environ),
        settings=tuple(settings),
        overrides=tuple(map(written.override, overrides)),
        hidden=hidden,
        save=save,
        converted=model.converted,
        conversion=model.conversion,
        export=_export(by_name, save, model),
    )


def _launch(settings: Iterable[Setting], environ: Mapping[str, str]) -> Launch:
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
    if launch.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as of its ranks; this process computes nothing
    is_on_cpu = cpu.prepare()  # before Megatron is imported
    complete(launch, environ, num_gpus=0 if is_on_cpu else torch.cuda.device_count())
    return launch


def _argv(settings: Iterable[Setting], catalog: Catalog) -> tuple[list[str], dict[str, Setting]]:
    """Turn settings into flags, and say which set which; each error names the setting's line."""
    argv: list[str] = []
    given: dict[str, Setting] = {}
    for setting in settings:
        if setting.section not in SECTIONS:
            end = catalog.nearest_section(setting.section)
            raise FlagError(f"{setting.place}: unknown section {setting.section}{end}")
        if (setting.section, setting.key) in OWN_KEYS:
            continue
        if setting.section == LAUNCH and setting.key in LAUNCH_HELP:
            given[setting.name] = setting
            continue
        try:
            spelling = catalog.find(setting.section, setting.key)
            flags = catalog.flags(spelling, setting.value)
        except FlagError as error:
            raise FlagError(f"{setting.place}: {setting.name}: {error}") from None
        if (other := given.get(spelling.option)) is not None:
            raise FlagError(
                f"{setting.place}: {setting.name} sets {spelling.option}, which {other.name} "
                f"({other.place}) sets already; drop one of them"
            )
        argv += flags
        given |= dict.fromkeys(catalog.options(spelling), setting)
    if PER_TOKEN not in given:  # false is left to the checks, which say why
        argv.append(PER_TOKEN)
    return argv, given


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The model as ``model.hf`` names it.

    Attributes:
        flags: Megatron's flags for the model.
    """

    converted: Path | None = None
    conversion: Conversion | None = None
    flags: tuple[str, ...] = ()

    def start(self, args: Any) -> list[str]:
        """Return the flags that start a run from the model; parsed flags get what is there now."""
        if self.converted is None:
            return []
        args.megasft_hf = str(self.converted)
        if self.conversion is not None and not (self.converted / MODEL_FILE).is_file():
            args.megasft_hf = str(self.conversion.source)
        args.pretrained_checkpoint = args.pretrained_checkpoint or args.megasft_hf
        return ["--megasft-hf", str(self.converted)]

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
        return cls(converted=output, conversion=conversion, flags=flags)


def _resumes(setting: Setting | None, args: Any, launch: Launch) -> bool:
    """Say whether the run is to go on from its own checkpoints, by ``--load``."""
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
    return bool(resume == "auto" and args.save and not args.load)


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
