"""One forward pass of a checkpoint, with the model that a training run builds.

In float32, whatever the checkpoint is stored in: loading widens, and only rounding is left between
two programs that compute the same.
"""

import argparse
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import torch

from megasft.errors import ConversionError
from megasft.files import MODEL_FILE
from megasft.megatron import flags

FORWARD_FLAGS: Final = (
    *("--micro-batch-size", "1", "--global-batch-size", "64", "--train-iters", "1", "--lr", "0"),
    *("--attention-dropout", "0", "--no-load-optim", "--no-load-rng", "--finetune"),
)
"""What Megatron's parser asks for beside the model, to load it and go forward once."""

OF_TRAINING: Final = frozenset(
    (
        *("attention_dropout", "hidden_dropout", "max_position_embeddings", "padded_vocab_size"),
        *("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_token_dispatcher_type"),
        *("moe_router_bias_update_rate", "moe_router_dtype", "mtp_num_layers"),
    )
)
"""Flags of a model file that a run may set otherwise, and that change no logit of a trained model
in float32."""

OF_ANY_MODEL: Final = frozenset(
    (
        *("rotary_base", "rotary_percent", "rotary_interleaved", "use_rope_scaling"),
        *("rope_scaling_factor", "rotary_scaling_factor", "norm_epsilon", "qk_layernorm"),
        *("window_size", "apply_layernorm_1p", "megasft_rope_scaling", "softmax_type"),
        *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_topk"),
        *("moe_router_topk_scaling_factor", "moe_router_enable_expert_bias"),
        *("moe_router_num_groups", "moe_router_group_topk"),
    )
)
"""Flags that change what the same tensors compute, compared also where no model file sets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint and layout.

    Attributes:
        model_flags: Of the model, when ``checkpoint`` has no flags file.
        flags: Of the layout.
        checkpoint: What ``--save`` named, or a converted checkpoint.
        iteration: Name of the folder in it, ``release`` for a conversion.
        documents: Token ids, laid end to end in one row.
        output: File of the logits, float32 [tokens, vocabulary]. Beside it ``.error`` says why
            there are none, and ``.layers`` holds what was found layer by layer.
        rounded_to: dtype that parameters are rounded to before they are used.
        hidden: Folder with Hugging Face's hidden states, to go layer by layer; else the whole
            model is in memory.
    """

    model_flags: tuple[str, ...]
    flags: tuple[str, ...]
    checkpoint: str
    iteration: str
    documents: tuple[tuple[int, ...], ...]
    output: str
    hidden: str | None = None
    rounded_to: str | None = None

    @property
    def num_layers_done(self) -> int:
        """Layers finished so far, of a case that goes layer by layer."""
        path = Path(self.output).with_suffix(".progress")
        return len(path.read_bytes()) if path.is_file() else 0

    @property
    def row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and positions, int64 [1, tokens], and document borders, int32."""
        tokens = torch.tensor([token for document in self.documents for token in document])
        positions = torch.cat([torch.arange(len(document)) for document in self.documents])
        borders = torch.tensor([0, *accumulate(map(len, self.documents))], dtype=torch.int32)
        return tokens[None], positions[None], borders

    def all_flags(self) -> list[str]:
        """Return every flag, with what a forward pass needs beside the model."""
        folder = Path(self.checkpoint)
        given = [*self.model_flags, *FORWARD_FLAGS, *self.flags]
        if self.iteration == "release":
            given += ["--pretrained-checkpoint", self.checkpoint]
        else:
            number = self.iteration.removeprefix("iter_").lstrip("0") or "0"
            given += ["--load", self.checkpoint, "--ckpt-step", number]
        if (folder / MODEL_FILE).is_file():
            given += ["--megasft-hf", self.checkpoint]
        return given


def initialize(args: Any) -> None:
    """Make Megatron's process groups and globals, as a run without data."""
    from megatron.training.initialize import initialize_megatron

    flags.publish(args)
    initialize_megatron()


def require_same_model(args: Any, case: Case) -> None:
    """Check that a run was trained as the model it is compared with; tensors do not tell.

    A training run saves its flags with its tensors. A conversion has none of its own.

    Raises:
        ConversionError: It was trained with other flags.
    """
    from megatron.core import dist_checkpointing

    folder = str(Path(case.checkpoint) / case.iteration)
    saved = dist_checkpointing.load_common_state_dict(folder).get("args")
    if saved is None:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_flags(parser)
    given = {a.dest for a in parser._actions if set(a.option_strings) & set(case.model_flags)}
    wrong = [
        f"{name} is {getattr(saved, name)!r} and not {getattr(args, name)!r}"
        for name in sorted((given | OF_ANY_MODEL) - OF_TRAINING)
        if hasattr(saved, name)
        and hasattr(args, name)
        and str(getattr(saved, name)) != str(getattr(args, name))
    ]
    if wrong:
        raise ConversionError(
            f"{folder} was trained as another model than config.json describes: {'; '.join(wrong)}"
        )


def build(config: Any) -> torch.nn.Module:
    """Build what a training run builds, but with logits of the whole vocabulary."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    config.parallel_output = False
    builder = config.get_builder_cls()(config)
    model: torch.nn.Module = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.eval()


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers that a checkpoint holds, by name."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def require_loaded(tensors: dict[str, torch.Tensor], case: Case) -> None:
    """Check that nothing is as it was before loading.

    Raises:
        ConversionError: There is nan, which everything was filled with, or which the file holds.
    """
    left = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    if left:
        raise ConversionError(
            f"{len(left)} tensors of Megatron's model are nan after loading {case.checkpoint} "
            f"({', '.join(left[:3])}): it does not hold them, or holds nan; convert again"
        )


def round_parameters(model: torch.nn.Module, case: Case) -> None:
    """Round parameters that are in memory as an export does; what steers routing stays."""
    if case.rounded_to is not None:
        for parameter in model.parameters():
            if parameter.device.type != "meta":
                parameter.data = parameter.to(getattr(torch, case.rounded_to)).to(parameter.dtype)


def load_whole(model: torch.nn.Module, case: Case) -> None:
    """Load all weights with Megatron's own loader, and see that none was left out."""
    from megatron.training.checkpointing import load_checkpoint

    for tensor in stored_tensors(model).values():
        tensor.data.fill_(torch.nan)
    load_checkpoint([model], None, None)
    require_loaded(stored_tensors(model), case)
    round_parameters(model, case)


def forward(model: Any, case: Case) -> torch.Tensor | None:
    """Run one forward pass; None on all but the last pipeline stage.

    Returns:
        float32 [tokens, vocabulary].
    """
    from megatron.core import parallel_state as groups

    from megasft.megatron.core_attention import packed_row

    tokens, positions, borders = case.row
    row = packed_row(borders, positions[0], cp_rank=0, cp_size=1)
    if not groups.is_pipeline_first_stage():
        cut = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
        received = torch.empty(tokens.shape[1] // cut, 1, model.config.hidden_size)
        torch.distributed.recv(received, groups.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    with torch.no_grad():
        output: torch.Tensor = model(tokens, positions, None, packed_seq_params=row)
    if groups.is_pipeline_last_stage():
        return output[0]
    following = groups.get_pipeline_model_parallel_next_rank()
    torch.distributed.send(output.contiguous(), following)
    return None
