"""What goes along with the weights: configuration, Megatron's flags, tokenizer, templates."""

import hashlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from checkpoint_convert.config_map import Model
from checkpoint_convert.files import MANIFEST
from checkpoint_convert.hf_folder import TEMPLATE_FOLDER, WEIGHT_ENDINGS
from checkpoint_convert.verify.verification import failed, passed
from megasft.checks.engine import Finding
from megasft.errors import ConversionError
from megasft.files import MODEL_FILE, SIDE_FOLDER

DTYPE_FIELDS: Final = ("dtype", "torch_dtype")


def left_out(checkpoint: Path, names: Container[str]) -> list[str]:
    """Return the tensors that a conversion was asked to leave out, of those a folder holds."""
    path = checkpoint / MODEL_FILE
    found = _read_json(path).get("left_out", []) if path.is_file() else []
    return [name for name in found if name in names]


def check_flags(checkpoint: Path, model: Model) -> Finding:
    """Compare the flags file with what the folder's configuration gives today."""
    path = checkpoint / MODEL_FILE
    if not path.is_file():
        detail = f"no {MODEL_FILE}: a training run's folder; the flags are those of the folder"
        return passed("flags", detail, {"flags": 0})
    stored = _read_json(path)
    found, wanted = (_by_flag(flags) for flags in (stored.get("flags", ()), model.flags))
    wrong = _differences(found, wanted, missing="is not set")
    facts = {"family": model.family_name, "vocab_size": model.vocab_size}
    wrong += _differences({name: stored.get(name) for name in facts}, facts)
    changed = _differences(stored.get("hf_config", {}), model.hf_config)
    wrong += [f"hf_config: {text}" for text in changed]
    if wrong:
        detail = f"{MODEL_FILE} is not what config.json gives: {'; '.join(wrong)}"
        return failed("flags", detail, {"wrong": len(wrong)})
    detail = f"{len(wanted)} flags and {len(model.hf_config)} fields as config.json gives them"
    return passed("flags", detail, {"flags": len(wanted), "wrong": 0})


def check_returned_config(hf_config: Mapping[str, Any], hf_out: Path) -> Finding:
    """Compare the fields of two ``config.json``; the dtype is the tensors' business."""
    found = _read_json(hf_out / "config.json")
    stated = {name: (hf_config.get(name), found.get(name)) for name in DTYPE_FIELDS}
    wanted, others = (
        {name: value for name, value in config.items() if name not in DTYPE_FIELDS}
        for config in (hf_config, found)
    )
    wrong = _differences(others, wanted)
    if wrong:
        detail = f"config.json: {'; '.join(wrong)}"
        return failed("returned config", detail, {"wrong": len(wrong)})
    dtypes = [f"{name} is {b} and was {a}" for name, (a, b) in stated.items() if a != b]
    detail = "; ".join([f"{len(wanted)} fields equal", *dtypes])
    return passed("returned config", detail, {"fields": len(wanted), "wrong": 0})


def check_files(hf: Path, folder: Path, *, name: str, but: Iterable[str] = ()) -> Finding:
    """Compare files byte by byte.

    Args:
        hf: The truth.
        folder: Where they should be, no more and no fewer.
        name: Of the check.
        but: Files that are compared elsewhere.
    """
    if not folder.is_dir():
        return failed(name, f"{folder} is not there; convert again")
    wanted, found = (_digests(path, but) for path in (hf, folder))
    wrong = [f"{file} is missing" for file in wanted if file not in found]
    wrong += [f"{file} is not in {hf}" for file in found if file not in wanted]
    wrong += [f"{f} differs" for f in wanted if f in found and wanted[f] != found[f]]
    if wrong:
        return failed(name, f"{folder}: {'; '.join(wrong)}", {"wrong": len(wrong)})
    detail = f"{len(wanted)} files equal byte for byte"
    return passed(name, detail, {"files": len(wanted), "wrong": 0})


def check_side_folder(hf: Path, checkpoint: Path) -> Finding:
    """Compare the files a converted checkpoint keeps for the way back."""
    folder = checkpoint / SIDE_FOLDER
    if not folder.is_dir() and not (checkpoint / MODEL_FILE).is_file():
        return passed("files", f"no {SIDE_FOLDER}/: a training run's folder keeps none")
    return check_files(hf, folder, name="files")


def digests(folder: Path) -> dict[str, str]:
    """Return SHA-256 of every file of a folder that is not weights, by its path in it."""
    return _digests(folder, ())


def _digests(folder: Path, but: Iterable[str]) -> dict[str, str]:
    left_out = {MANIFEST, *but}
    paths = [*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file()
        and path.name not in left_out
        and not path.name.startswith(".")
        and not path.name.endswith(WEIGHT_ENDINGS)
    }


def _by_flag(flags: Iterable[str]) -> dict[str, str]:
    """Return values by flag; of a switch, that it is set.

    Example:
        >>> _by_flag(["--swiglu", "--num-layers", "2"])
        {'--swiglu': 'set', '--num-layers': '2'}
    """
    found: dict[str, list[str]] = {}
    name = ""
    for text in flags:
        # A negative number is a value.
        if text.startswith("--"):
            name = text
            found[name] = []
        else:
            found.setdefault(name, []).append(text)
    return {flag: " ".join(values) or "set" for flag, values in found.items()}


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], *, missing: str = "is missing"
) -> list[str]:
    wrong = [f"{name} {missing}" for name in wanted if name not in found]
    wrong += [f"{name} = {found[name]!r} is extra" for name in found if name not in wanted]
    wrong += [
        f"{name} is {found[name]!r} and not {wanted[name]!r}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    return wrong


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read ({error}); convert again") from error
    return content
