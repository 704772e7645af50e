"""A Hugging Face model folder: everything in it that is not weights."""

import shutil
from pathlib import Path
from typing import Final

import orjson
import torch

from checkpoint_convert.files import MANIFEST
from megasft.errors import ConversionError
from megasft.files import SIDE_FOLDER

WEIGHT_ENDINGS: Final = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".safetensors.index.json", ".bin.index.json"),
)

TOKENIZER_FILES: Final = frozenset(
    (
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt"),
        *("chat_template.jinja", "chat_template.json"),
    )
)

TEMPLATE_FOLDER: Final = "additional_chat_templates"


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


def side_files(folder: Path) -> list[str]:
    """Return the names of what is not weights: configuration, tokenizer, templates, licence."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(WEIGHT_ENDINGS)
        and path.name != MANIFEST
    )


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what is not weights; return the names in order."""
    target.mkdir(parents=True, exist_ok=True)
    names = side_files(source)
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER, dirs_exist_ok=True)
    return names


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Make ``config.json`` say the dtype the weights have, under the name it uses for it."""
    path = folder / "config.json"
    config = orjson.loads(path.read_bytes())
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[name] = str(dtype).removeprefix("torch.")
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
