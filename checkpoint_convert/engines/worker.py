"""One bridge, alone in its process: builds its model, and moves weights from one side to the other.

Usage: python -m checkpoint_convert.engines.worker ENGINE to-megatron HF OUTPUT
       python -m checkpoint_convert.engines.worker ENGINE to-hf ITERATION LIKE OUTPUT

``to-megatron`` writes OUTPUT/release as our own conversion does, and OUTPUT/flags.json. ``to-hf``
reads one iteration of a checkpoint into the model that LIKE describes, and writes its weights.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
import torch
from torch._C._distributed_c10d import HashStore

from megasft.megatron import cpu

CONTENT_METADATA: Final = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""As in ``megatron_writer``."""


class Bridge(Protocol):
    """What the two bridges have in common."""

    def build(self, hf: Path) -> tuple[Any, Any]:
        """Return Megatron's model with a folder's weights, and its configuration."""
        ...

    def write(self, model: Any, hf: Path, output: Path) -> None:
        """Write a model's weights as Hugging Face's."""
        ...


class McoreBridge:
    """mcore-bridge 1.6, by ModelScope."""

    def build(self, hf: Path) -> tuple[Any, Any]:
        """Build and load; see ``Bridge``."""
        from mcore_bridge import (  # type: ignore[import-not-found,unused-ignore]
            ModelConfig,
            get_mcore_model,
            hf_to_mcore_config,
        )
        from transformers import AutoConfig

        said = AutoConfig.from_pretrained(hf)
        config = ModelConfig(
            params_dtype=_dtype(said),
            use_cpu_initialization=cpu.is_needed(),
            **hf_to_mcore_config(said),
        )
        models = get_mcore_model(config)
        config.bridge.load_weights(models, str(hf))
        return models[0], config

    def write(self, model: Any, hf: Path, output: Path) -> None:
        """Write; see ``Bridge``."""
        model.config.bridge.save_weights([model], str(output))


class MegatronBridge:
    """Megatron-Bridge, by NVIDIA; written to its documented interface, not run here."""

    def build(self, hf: Path) -> tuple[Any, Any]:
        """Build and load; see ``Bridge``."""
        from megatron.bridge import (  # type: ignore[import-not-found,unused-ignore]
            AutoBridge,
        )

        self._bridge = AutoBridge.from_hf_pretrained(str(hf))
        provider = self._bridge.to_megatron_provider(load_weights=True)
        models = provider.provide_distributed_model(wrap_with_ddp=False)
        return models[0], provider

    def write(self, model: Any, hf: Path, output: Path) -> None:
        """Write; see ``Bridge``."""
        self._bridge.save_hf_weights([model], str(output))


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def start() -> None:
    """Become a run of one process."""
    cpu.prepare(hide=())  # bridges build Transformer Engine's layers, without running them
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "gloo" if cpu.is_needed() else "nccl"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def sharded(model: Any) -> Any:
    """Return Megatron's description of a model's tensors, as our checkpoints have them."""
    return model.sharded_state_dict(metadata=dict(CONTENT_METADATA))


def to_megatron(bridge: Bridge, hf: Path, output: Path) -> None:
    """Write a checkpoint and the model's flags."""
    from megatron.core import dist_checkpointing
    from megatron.training.arguments import add_megatron_arguments

    from checkpoint_convert.engines.flags import model_flags
    from checkpoint_convert.megatron_checkpoint import RELEASE, TRACKER

    model, config = bridge.build(hf)
    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    flags = model_flags(config, parser)
    release = output / RELEASE
    release.mkdir(parents=True)
    common = {
        "args": argparse.Namespace(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            no_save_optim=True,
            no_save_rng=True,
        ),
        "checkpoint_version": 3.0,
        "iteration": 0,
    }
    state = sharded(model) | common
    dist_checkpointing.save(state, str(release), content_metadata=dict(CONTENT_METADATA))
    (output / TRACKER).write_text(RELEASE)
    (output / "flags.json").write_bytes(orjson.dumps(flags))


def to_hf(bridge: Bridge, iteration: Path, like: Path, output: Path) -> None:
    """Read a checkpoint into the bridge's model and write it."""
    from megatron.core import dist_checkpointing

    model, _ = bridge.build(like)
    wanted = sharded(model)
    names = list(wanted)
    state = dist_checkpointing.load(wanted, str(iteration))
    model.load_state_dict({name: state[name] for name in names})
    bridge.write(model, like, output)


def main() -> int:
    """Run one direction."""
    engine, direction, *paths = sys.argv[1:]
    start()
    bridge: Bridge = McoreBridge() if engine == "mcore-bridge" else MegatronBridge()
    if direction == "to-megatron":
        to_megatron(bridge, *map(Path, paths))
    else:
        to_hf(bridge, *map(Path, paths))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    # Megatron's checkpoint writers import this module again.
    sys.exit(main())
