"""What a mixture file says: which samples take part, how often, and in which order of stages.

The file is YAML or JSON, and means the same for conversation files (``megasft mix``) and for token
stores (``--megasft-mixture``):

    seed: 42               # of the draw; without it the seed of the run
    rest: drop             # samples no part names: error (the default), keep (each once) or drop
    curriculum: two-stage  # mixed (the default): one shuffle; sequential: part after part;
    replay: 0.25           # two-stage: the specialised parts, then all others and this much of them
    total: 50000           # with weights: samples to draw from all parts together
    parts:
      - {source: chat.jsonl, max_samples: 10000}
      - {category: maths, sample_rate: 2.3, specialised: true}

A part names a ``source`` (file, folder or store, by path or by name), a ``category`` (name or id),
or both, and says how often its samples are drawn. ``sample_rate: 2.3`` is two whole copies and a
random 30 % of a third; 1 is the default. ``weight`` is a share of the whole epoch instead, so all
parts have one or none has: of the ``total`` samples (by default as many as the parts hold), a part
gets its weight over the sum of all weights. Samples are counted, not tokens. ``max_samples`` cuts
what either says, and nobody else gets what it cuts.

OpenSFT's ``{"data_name", "data_path", "ratio": [{"category_id", "category_name", "size",
"sample_rate"}]}`` is such a file too: ``ratio`` is its word for ``parts``. A ``size`` other than
what is found is a warning, not an error: it says what was counted when the file was written, and a
store holds fewer samples than its text by those that were rejected. An unknown key is an error,
because a misspelt rate would train something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any, Final

import orjson

from megasft.errors import DataError

CURRICULA: Final = ("mixed", "sequential", "two-stage")
RESTS: Final = ("error", "keep", "drop")

_KEYS: Final = (
    *("seed", "rest", "curriculum", "replay", "total", "parts"),
    *("data_name", "data_path", "ratio"),
)
_PART_KEYS: Final = (
    *("source", "category", "category_id", "category_name", "sample_rate", "weight"),
    *("max_samples", "size", "specialised"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Samples that are drawn alike.

    Attributes:
        name: What messages call it.
        source: Path or name of a file, folder or store; empty for all.
        category: Name of a category; empty for none given.
        category_id: Its id; None for none given.
        sample_rate: Samples drawn for each one found.
        weight: Share of the whole instead of a rate; None where the file has rates.
        max_samples: At most so many are drawn.
        size: Samples the file's author counted.
        specialised: Trained in the first of two stages.
    """

    name: str
    source: str = ""
    category: str = ""
    category_id: int | None = None
    sample_rate: Fraction = Fraction(1)
    weight: Fraction | None = None
    max_samples: int | None = None
    size: int | None = None
    specialised: bool = False

    @property
    def may_be_empty(self) -> bool:
        """Whether finding nothing is no fault: nothing is wanted, or was counted before."""
        if self.weight is not None:
            return self.weight == 0
        return self.sample_rate == 0 or self.size == 0


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture file that has been checked.

    Attributes:
        path: The file.
        parts: In its order.
        seed: Of the draw; None when the file names none.
        rest: One of ``RESTS``.
        curriculum: One of ``CURRICULA``.
        replay: Share of the specialised samples that comes again in the second of two stages.
        total: Samples of all parts together, for weights; None for as many as they hold.
        data_path: Where OpenSFT's file says the data is; empty for nowhere.
    """

    path: Path
    parts: tuple[Part, ...]
    seed: int | None = None
    rest: str = "error"
    curriculum: str = "mixed"
    replay: Fraction = Fraction(0)
    total: int | None = None
    data_path: str = ""

    def inputs(self) -> list[str]:
        """Return the inputs the file itself names, relative ones as seen from here or from it.

        Raises:
            DataError: There is no ``data_path``, and not every part has a source.
        """
        named = [self.data_path] if self.data_path else [part.source for part in self.parts]
        if not all(named):
            raise DataError(
                f"{self.path} names no data: it has no data_path, and {named.count('')} of its "
                f"{len(named)} parts have no source; name the files with --input"
            )
        beside = ((name, self.path.parent / name) for name in dict.fromkeys(named))
        return [
            str(there) if there.exists() and not Path(here).exists() else here
            for here, there in beside
        ]


def read_mixture(path: Path | str) -> Mixture:
    """Read a mixture file, ours or OpenSFT's.

    Raises:
        DataError: It cannot be read, or says something that has no meaning.
    """
    path = Path(path)
    fields = _Fields(f"{path}", _load(path))
    fields.require_known(_KEYS)
    listed = [key for key in ("parts", "ratio") if fields.get(key) is not None]
    if len(listed) != 1 or not isinstance(fields.get(listed[0]), list) or not fields.get(listed[0]):
        raise DataError(f"{path} needs one list of parts, called parts (or ratio, by OpenSFT)")
    parts = tuple(
        _part(_Fields(f"{path}: part {i}", item))
        for i, item in enumerate(fields.get(listed[0]), start=1)
    )
    mixture = Mixture(
        path,
        parts,
        seed=fields.whole("seed", least=0),
        rest=fields.one_of("rest", RESTS),
        curriculum=fields.one_of("curriculum", CURRICULA),
        replay=fields.number("replay") or Fraction(0),
        total=fields.whole("total", least=1),
        data_path=fields.text("data_path"),
    )
    _check_weights(mixture)
    _check_stages(mixture, has_replay=fields.get("replay") is not None)
    return mixture


def _load(path: Path) -> Any:
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"mixture {path} cannot be read: {error.strerror or error}") from None
    try:
        if text.lstrip().startswith(b"{"):
            return orjson.loads(text)
        from omegaconf import OmegaConf

        return OmegaConf.to_container(OmegaConf.create(text.decode()))
    except Exception as error:  # the YAML library has no common error of its own
        raise DataError(f"mixture {path} is neither JSON nor YAML: {error}; mend it") from None


class _Fields:
    """One object of the file, read key by key; a fault names the object."""

    def __init__(self, place: str, raw: Any) -> None:
        if not isinstance(raw, Mapping):
            raise DataError(f"{place} must be keys and values, and is {raw!r}")
        self.place, self._raw = place, raw

    def require_known(self, known: tuple[str, ...]) -> None:
        unknown = [str(key) for key in self._raw if key not in known]
        if unknown:
            raise DataError(f"{self.place} has {', '.join(unknown)}; known are {', '.join(known)}")

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def text(self, key: str) -> str:
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {key} must be a text, and is {value!r}")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise DataError(f"{self.place}: {key} must be true or false, and is {value!r}")
        return bool(value)

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        value = choices[0] if self.get(key) is None else self.get(key)
        if value not in choices:
            raise DataError(f"{self.place}: {key} must be {', '.join(choices)}, and is {value!r}")
        return str(value)

    def whole(self, key: str, *, least: int) -> int | None:
        value = self.get(key)
        if value is not None and (type(value) is not int or value < least):
            raise DataError(f"{self.place}: {key} must be an integer >= {least}, and is {value!r}")
        return value

    def number(self, key: str) -> Fraction | None:
        """Return a number as it is written: 2.3 is 23/10, so that 2.3 x 10 samples are 23."""
        value = self.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not isfinite(value) or value < 0:
            raise DataError(f"{self.place}: {key} must be a number >= 0, and is {value!r}")
        return Fraction(str(value))


def _part(fields: _Fields) -> Part:
    fields.require_known(_PART_KEYS)
    name, number = fields.text("category_name"), fields.whole("category_id", least=0)
    category = fields.get("category")
    if category is not None and (name or number is not None):
        raise DataError(
            f"{fields.place} has category beside category_id or category_name; drop one of them"
        )
    if type(category) is int:
        number = fields.whole("category", least=0)
    elif category is not None:
        name = fields.text("category")
    source = fields.text("source")
    if not source and not name and number is None:
        raise DataError(f"{fields.place} chooses nothing; give it a source or a category")
    rate, weight = fields.number("sample_rate"), fields.number("weight")
    if rate is not None and weight is not None:
        raise DataError(f"{fields.place} has both sample_rate and weight; drop one of them")
    return Part(
        _part_name(source, name, number),
        source,
        name,
        number,
        Fraction(1) if rate is None else rate,
        weight,
        fields.whole("max_samples", least=1),
        fields.whole("size", least=0),
        fields.flag("specialised"),
    )


def _part_name(source: str, category: str, category_id: int | None) -> str:
    """Example: ``maths.jsonl, category algebra (3)``."""
    number = "" if category_id is None else f"({category_id})"
    words = [f"category {' '.join(filter(None, (category, number)))}"] if category or number else []
    return ", ".join([*([source] if source else []), *words])


def _check_weights(mixture: Mixture) -> None:
    without = [part.name for part in mixture.parts if part.weight is None]
    if len(without) == len(mixture.parts):
        if mixture.total is not None:
            raise DataError(f"{mixture.path}: total has no effect without weights; drop it")
        return
    if without:
        raise DataError(
            f"{mixture.path}: a weight is a share of the whole, so every part has one or none; "
            f"missing for {'; '.join(without)}"
        )
    if not any(part.weight for part in mixture.parts):
        raise DataError(f"{mixture.path}: all weights are 0, so nothing would be drawn")
    if mixture.rest == "keep":
        raise DataError(
            f"{mixture.path}: rest: keep would add samples that have no weight; name them in a "
            "part, or set rest: drop"
        )


def _check_stages(mixture: Mixture, *, has_replay: bool) -> None:
    specialised = [part.specialised for part in mixture.parts]
    if mixture.curriculum != "two-stage":
        given = [
            *(["replay"] if has_replay else []),
            *(["specialised"] if any(specialised) else []),
        ]
        if given:
            raise DataError(
                f"{mixture.path}: {' and '.join(given)} has no effect with curriculum: "
                f"{mixture.curriculum}; drop it, or set curriculum: two-stage"
            )
        return
    if not has_replay:
        raise DataError(
            f"{mixture.path}: two-stage needs replay, the share of the specialised samples that "
            "comes again in the second stage; 0 for none"
        )
    if not any(specialised) or (all(specialised) and mixture.rest != "keep"):
        raise DataError(
            f"{mixture.path}: two-stage needs parts with specialised: true and others without; "
            f"{sum(specialised)} of {len(specialised)} have it"
        )
