"""A converted checkpoint holds exactly what Transformer Engine's layers ask for, and nothing else.

Their layers join norms and linear layers under other names than Megatron's local ones. Building and
loading them needs Transformer Engine installed, but no GPU.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from checkpoint_convert import hf_to_megatron
from checkpoint_convert.megatron_writer import CONTENT_METADATA
from tests.megatron.runs import torchrun
from tests.unit.checkpoint_convert.tiny_models import MODELS, save


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
def test_the_keys_are_those_of_transformer_engines_layers(tmp_path: Path) -> None:
    cases = []
    for name in MODELS:
        hf_to_megatron.convert(save(name, tmp_path / f"{name}_hf"), tmp_path / name)
        paths = {"checkpoint": str(tmp_path / name), "output": str(tmp_path / f"{name}.pt")}
        cases.append(paths | {"metadata": CONTENT_METADATA})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun(1, "-m", "tests.megatron.te_spec_worker", str(tmp_path / "cases.json"), is_warm=False)
    for name in MODELS:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        metadata = FileSystemReader(tmp_path / name / "release").read_metadata()
        stored = {key for key in metadata.state_dict_metadata if not key.startswith("common_state")}
        assert set(found["keys"]) == stored, name
        assert len(found["state"]) > 10
        assert not any(t.isnan().any() for t in found["state"].values() if t.is_floating_point())
