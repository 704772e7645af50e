"""Rope scaled as Hugging Face scales it, for what Megatron's flags cannot say.

``--megasft-rope-scaling`` takes the ``rope_parameters`` of a Hugging Face configuration as JSON.
The builder sets the frequencies of Megatron's own ``RotaryEmbedding`` to what these formulas give;
what reads them (packed rows, context parallelism, fused kernels) is Megatron's as before.

YaRN's attention factor multiplies cos and sin, and so scores by its square, behind the norms of
queries and keys if there are any. The softmax scale says the same in one place that every attention
reads, ours and Transformer Engine's. It holds only when all of a head is rotated and every layer
has rope; else the flag is refused. Rejected: the ``yarn_*`` attributes of Megatron's config, which
its fused rope for packed rows drops without a word, and ``--position-embedding-type yarn``, which
turns that kernel off and multi-token prediction with it.

Latent attention builds its rope itself: there the JSON sets the fields of Megatron's config that
have no flag.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import torch

from megasft.errors import FlagError

FLAG: Final = "--megasft-rope-scaling"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """What the flag says, checked.

    Attributes:
        rope_type: A key of ``FORMULAS``.
        values: The further fields, by the names of transformers' ``rope_parameters``.
    """

    rope_type: str
    values: Mapping[str, float]

    @property
    def attention_factor(self) -> float:
        """What multiplies cos and sin; 1 for anything but YaRN.

        Source: YaRN (arXiv 2309.00071), section 3.4, for the default; ``mscale`` as DeepSeek-V2
        added it. Mirrors ``_compute_yarn_parameters`` of transformers 5.
        """
        if self.rope_type != "yarn":
            return 1.0
        given = self.values.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self.values["factor"]
        mscale, all_dim = self.values.get("mscale"), self.values.get("mscale_all_dim")
        if mscale and all_dim:
            return _mscale(factor, mscale) / _mscale(factor, all_dim)
        return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _plain(dim: int, base: float) -> torch.Tensor:
    return 1.0 / _wave_numbers(dim, base)


def _wave_numbers(dim: int, base: float) -> torch.Tensor:
    exponents: torch.Tensor = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return base**exponents


def linear(values: Mapping[str, float], dim: int, base: float) -> torch.Tensor:
    """Divide every frequency by ``factor``: positions interpolated (arXiv 2306.15595)."""
    return _plain(dim, base) / values["factor"]


def llama3(values: Mapping[str, float], dim: int, base: float) -> torch.Tensor:
    """Divide frequencies of long waves by ``factor``, leave those of short ones, blend between.

    Source: ``apply_scaling`` in Llama 3.1's reference code (meta-llama/llama-models,
    ``models/llama3/model.py``), in the order of operations of transformers 5.
    """
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    context, factor = values["original_max_position_embeddings"], values["factor"]
    inv_freq = _plain(dim, base)
    wavelength = 2 * math.pi / inv_freq
    is_long, is_short = wavelength > context / low, wavelength < context / high
    scaled = torch.where(is_long, inv_freq / factor, inv_freq)
    weight = (context / wavelength - low) / (high - low)
    blended = (1 - weight) * scaled / factor + weight * scaled
    return torch.where(~is_short & ~is_long, blended, scaled)


def yarn(values: Mapping[str, float], dim: int, base: float) -> torch.Tensor:
    """Divide slow frequencies by ``factor``, leave fast ones, blend by the turns they make.

    Source: YaRN (arXiv 2309.00071), section 3.2, in the order of operations of transformers 5,
    which counts turns over the original context and rounds the range outwards unless ``truncate``
    is false.
    """
    context = values["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(values.get("beta_fast") or 32)
    high = dimension(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    numbers = _wave_numbers(dim, base)
    return 1.0 / (values["factor"] * numbers) * (1 - kept) + 1.0 / numbers * kept


FORMULAS: Final[dict[str, Callable[[Mapping[str, float], int, float], torch.Tensor]]] = {
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
}
"""``rope_type`` to a formula: fields, rotated size of a head and base to float32 [dim / 2], CPU."""

_NEEDED: Final = {
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_POSSIBLE: Final[dict[str, tuple[str, ...]]] = {
    "yarn": (
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("attention_factor", "truncate"),
    ),
}


def parse(text: str) -> RopeScaling:
    """Read the flag's value.

    Raises:
        FlagError: It is no JSON object, its type is unknown, or a field is missing, unknown or no
            positive number.

    Example:
        >>> parse('{"rope_type": "linear", "factor": 2.0}')
        RopeScaling(rope_type='linear', values={'factor': 2.0})
    """
    try:
        said = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise FlagError(f"{FLAG} {text} is not JSON ({error}); quote it as one word") from error
    if not isinstance(said, dict):
        raise FlagError(f"{FLAG} {text} is no JSON object; give rope_type and its fields")
    kind = said.pop("rope_type", None)
    if not isinstance(kind, str) or kind not in FORMULAS:
        raise FlagError(
            f"{FLAG}: rope_type is {kind!r}; it must be one of {', '.join(FORMULAS)}; "
            "others are plain, or depend on the length of a batch"
        )
    missing = [name for name in _NEEDED[kind] if name not in said]
    unknown = [name for name in said if name not in (*_NEEDED[kind], *_POSSIBLE.get(kind, ()))]
    if missing or unknown:
        raise FlagError(
            f"{FLAG}: {kind} rope lacks {', '.join(missing) or 'nothing'} and does not know "
            f"{', '.join(unknown) or 'anything else'}; mend the fields"
        )
    for name, value in said.items():
        if isinstance(value, bool) if name == "truncate" else _is_size(name, value):
            continue
        what = "true or false" if name == "truncate" else "a number above 0"
        raise FlagError(f"{FLAG}: {name} is {value!r}; it must be {what}")
    return RopeScaling(kind, said)


def _is_size(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Zero stands for absent in these two, as in transformers.
    return is_number and (value > 0 or (value == 0 and name.startswith("mscale")))


def from_flags(args: Any) -> RopeScaling | None:
    """Return what the flag says, checked against the other flags; None when it is not given.

    Raises:
        FlagError: With the fact and the remedy.
    """
    if args.megasft_rope_scaling is None:
        return None
    scaling = parse(args.megasft_rope_scaling)
    is_rope = args.position_embedding_type == "rope" or args.use_rotary_position_embeddings
    if not is_rope:
        raise FlagError(
            f"{FLAG} has no effect with --position-embedding-type {args.position_embedding_type}; "
            "add --position-embedding-type rope, or drop the flag"
        )
    excluded = {
        "--use-rope-scaling": args.use_rope_scaling,
        "--rotary-seq-len-interpolation-factor": args.rotary_seq_len_interpolation_factor,
    }
    given = [flag for flag, value in excluded.items() if value]
    if given:
        raise FlagError(f"{FLAG} and {', '.join(given)} exclude each other; drop one of them")
    (_check_latent if args.multi_latent_attention else _check_ordinary)(args, scaling)
    return scaling


def _check_ordinary(args: Any, scaling: RopeScaling) -> None:
    if scaling.attention_factor == 1.0:
        return
    parts = {
        "--rotary-percent below 1": args.rotary_percent < 1,
        "--no-rope-freq": args.no_rope_freq,
    }
    given = [what for what, is_given in parts.items() if is_given]
    if given:
        raise FlagError(
            f"{FLAG} multiplies scores by {scaling.attention_factor}^2, and {', '.join(given)} "
            'leaves scores without rope; drop it, or give "attention_factor": 1'
        )


def _check_latent(args: Any, scaling: RopeScaling) -> None:
    if scaling.rope_type != "yarn" or args.rope_type not in (None, "yarn"):
        raise FlagError(
            f"{FLAG} with --multi-latent-attention is {scaling.rope_type}, and --rope-type is "
            f"{args.rope_type}; both must be yarn"
        )
    foreign = [name for name in ("attention_factor", "truncate") if name in scaling.values]
    if foreign:
        raise FlagError(
            f"{FLAG}: Megatron's latent attention does not know {', '.join(foreign)}; drop it"
        )
    flags = {
        "--rotary-scaling-factor": args.rotary_scaling_factor != 1.0,
        "--mscale": args.mscale != 1.0,
        "--mscale-all-dim": args.mscale_all_dim != 0.0,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if given:
        raise FlagError(f"{FLAG} and {', '.join(given)} exclude each other; drop one of them")


def latent_fields(scaling: RopeScaling) -> dict[str, float]:
    """Return the fields of Megatron's ``MLATransformerConfig`` that say a scaling."""
    return {
        "rotary_scaling_factor": scaling.values["factor"],
        "original_max_position_embeddings": scaling.values["original_max_position_embeddings"],
        "beta_fast": scaling.values.get("beta_fast", 32),
        "beta_slow": scaling.values.get("beta_slow", 1),
        "mscale": scaling.values.get("mscale", 1.0),
        "mscale_all_dim": scaling.values.get("mscale_all_dim", 0.0),
    }


def scale(model: Any, scaling: RopeScaling, *, base: float) -> None:
    """Give one pipeline stage of Megatron's model the scaled frequencies.

    Every stage and every virtual chunk has its own ``rotary_pos_emb``, MTP layers share their
    stage's. It must not have run yet: Megatron caches what it returned.
    """
    rotary = model.rotary_pos_emb
    inv_freq = FORMULAS[scaling.rope_type](scaling.values, 2 * rotary.inv_freq.numel(), base)
    rotary.inv_freq = inv_freq.to(rotary.inv_freq.device)
