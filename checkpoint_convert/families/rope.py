"""From a configuration's rope to flags: Megatron's own where they can say it, ours where not.

Scaled rope is what converters get wrong without a word, because the model still runs. Megatron 0.19
hard-codes what Llama 3.1 has (an original context of 8192, factors 1 and 4) and, for latent
attention, what DeepSeek-V3 has (4096, betas 32 and 1): there are no flags for other values. Those
go through ``--megasft-rope-scaling`` (``megasft.megatron.rope``), whose formulas are those of
transformers; so does scaling that Megatron lacks or computes otherwise. Always using our flag was
rejected: a checkpoint of a released model should train with Megatron alone.

Refused: kinds whose frequencies depend on the length of the running batch (``dynamic``,
``longrope``), which no fixed set of frequencies can say.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from checkpoint_convert.families.config import Config, literal, not_expressible

_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Fields that transformers takes without a default, by the kinds that convert."""

_POSSIBLE: Final[dict[str, tuple[str, ...]]] = {
    "yarn": (
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("attention_factor", "truncate"),
    ),
}

_BY_LENGTH: Final = ("dynamic", "longrope")

_MEGATRON_LLAMA3: Final = {
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
}

_MEGATRON_LATENT: Final = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


class Rope(NamedTuple):
    """What a configuration says about rope.

    Attributes:
        kind: transformers' ``rope_type``.
        base: ``rope_theta``.
        scaling: The further fields of this kind.
    """

    kind: str
    base: int
    scaling: dict[str, Any]


RopeFlags = Callable[[Rope, Path], list[str]]
"""Rope, and the configuration's path for errors, to the flags that scale it."""


def read_rope(config: Config, path: Path) -> Rope:
    """Read the rope of a configuration, old or new.

    Raises:
        ConversionError: It is of a kind that does not convert, a field is missing or unknown, or
            the base is not a whole number.
    """
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    said = {name: value for name, value in said.items() if value is not None}
    base = said.pop("rope_theta", None) or config.get("rope_theta")
    kind = str(said.pop("rope_type", None) or said.get("type") or "default")
    said.pop("type", None)
    scaling = {"rope_type": kind, **said}
    if kind in _BY_LENGTH:
        raise not_expressible(
            path, "rope scaling", scaling, "its frequencies depend on the length of the batch"
        )
    if kind not in _NEEDED:
        raise not_expressible(
            path, "rope scaling", scaling, f"rope types that convert are {', '.join(_NEEDED)}"
        )
    known = (*_NEEDED[kind], *_POSSIBLE.get(kind, ()))
    unknown = {n: v for n, v in said.items() if n not in known and (isinstance(v, bool) or v != 1)}
    if unknown:
        raise not_expressible(
            path, "rope scaling", scaling, f"{', '.join(unknown)} has no meaning for {kind} rope"
        )
    missing = [name for name in _NEEDED[kind] if name not in said]
    if missing:
        raise not_expressible(
            path, "rope scaling", scaling, f"{kind} rope needs {', '.join(missing)}"
        )
    _require_numbers(said, scaling, path)
    if base is None or not float(base).is_integer():
        raise not_expressible(
            path, "rope_theta", base, "Megatron's --rotary-base is a whole number"
        )
    kept = [name for name in known if said.get(name) or said.get(name) is False]
    return Rope(kind, int(base), {name: said[name] for name in kept})


def _require_numbers(said: Mapping[str, Any], scaling: Mapping[str, Any], path: Path) -> None:
    """Check the values; 0 stands for absent where transformers says ``or``."""
    may_be_zero = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    for name, value in said.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_good = is_number and (value > 0 or (value == 0 and name in may_be_zero))
        if not (isinstance(value, bool) if name == "truncate" else is_good):
            raise not_expressible(path, "rope scaling", dict(scaling), f"{name} has no such value")


def rope_flags(rope: Rope, path: Path) -> list[str]:
    """Return the flags that scale the rope of ordinary attention.

    Example:
        >>> rope_flags(Rope("linear", 10000, {"factor": 2.0}), Path("config.json"))
        ['--megasft-rope-scaling', '{"rope_type":"linear","factor":2.0}']
    """
    if rope.kind == "default":
        return []
    if rope.kind == "llama3" and _has(rope.scaling, _MEGATRON_LLAMA3):
        return ["--use-rope-scaling", "--rope-scaling-factor", literal(rope.scaling["factor"])]
    return _our_flag(rope.kind, rope.scaling)


def latent_rope_flags(rope: Rope, path: Path) -> list[str]:
    """Return the flags that scale the rope of DeepSeek's latent attention.

    ``mscale`` and ``mscale_all_dim`` act at two places: their ratio multiplies cos and sin, and the
    second, squared, the softmax scale. Without both transformers takes ``0.1 log(factor) + 1`` for
    the ratio, which Megatron computes from 1 and 0.

    Raises:
        ConversionError: Megatron's latent attention cannot compute it.
    """
    if rope.kind == "default":
        # Megatron's fused rope for latent attention is of YaRN alone.
        return ["--rope-type", "rope", "--rotary-scaling-factor", "1", "--no-rope-fusion"]
    scaling = {"rope_type": rope.kind, **rope.scaling}
    if rope.kind != "yarn":
        raise not_expressible(path, "rope scaling", scaling, "latent attention has yarn alone")
    for name, allowed in (("attention_factor", None), ("truncate", True)):
        if rope.scaling.get(name, allowed) != allowed:
            raise not_expressible(
                path, f"rope scaling's {name}", scaling[name], "latent attention has no flag for it"
            )
    mscale, all_dim = (rope.scaling.get(name) or 0 for name in ("mscale", "mscale_all_dim"))
    if all_dim and not mscale:
        raise not_expressible(
            path, "rope scaling", scaling, "mscale_all_dim without mscale has no flags"
        )
    if not (mscale and all_dim):
        mscale, all_dim = 1, 0
    sizes = {
        "original_max_position_embeddings": rope.scaling["original_max_position_embeddings"],
        "beta_fast": rope.scaling.get("beta_fast") or 32,
        "beta_slow": rope.scaling.get("beta_slow") or 1,
    }
    factor = rope.scaling["factor"]
    if _has(sizes, _MEGATRON_LATENT):
        numbers = {
            "--rotary-scaling-factor": factor,
            "--mscale": mscale,
            "--mscale-all-dim": all_dim,
        }
        ours = [part for flag, value in numbers.items() for part in (flag, literal(value))]
    else:
        scales = {"mscale": mscale, "mscale_all_dim": all_dim}
        ours = _our_flag(rope.kind, {"factor": factor, **sizes, **scales})
    return ["--rope-type", "yarn", *ours]


def _has(scaling: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(scaling[name] == value for name, value in values.items())


def _our_flag(kind: str, scaling: Mapping[str, Any]) -> list[str]:
    return ["--megasft-rope-scaling", orjson.dumps({"rope_type": kind, **scaling}).decode()]
