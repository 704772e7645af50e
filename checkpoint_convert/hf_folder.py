"""A Hugging Face model folder: its tensors, and everything in it that is not weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import orjson
import torch
from safetensors.torch import load_file, save_file

from megasft.errors import ConversionError

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


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Map every tensor of a folder's safetensors into memory; pages are read when used.

    Raises:
        ConversionError: There are none, a shard is missing, or two files hold the same name.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConversionError(
            f"{folder} has no *.safetensors; load the model with transformers and write it again "
            "with save_pretrained()"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(orjson.loads(index.read_bytes())["weight_map"].values())
        missing = sorted(named - {path.name for path in paths})
        if missing:
            raise ConversionError(
                f"{index} names {', '.join(missing)}, which the folder lacks; download it again"
            )
        paths = [path for path in paths if path.name in named]
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        shard = load_file(path)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise ConversionError(f"{path} repeats {twice[0]}; keep one set of weights in {folder}")
        tensors.update(shard)
    return tensors


def write_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``model.safetensors`` as transformers does."""
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy configuration, tokenizer, chat templates and licence; return their names in order."""
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(
        path.name
        for path in source.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(WEIGHT_ENDINGS)
    )
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER)
    return names


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Make ``config.json`` say the dtype the weights have, under the name it uses for it."""
    path = folder / "config.json"
    config = orjson.loads(path.read_bytes())
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[name] = str(dtype).removeprefix("torch.")
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")
