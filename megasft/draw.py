"""From a mixture and what there is to which samples are drawn how often: indices, no data.

The draw of a part depends on the seed, the part's name and its stage alone, so it is the same on
every rank and with any number of workers, and stays what it is when another part is added. Totals
are exact: a part of n samples at rate r gives round(r n) (halves up), and each of its samples is
drawn floor(r) or ceil(r) times. Rejected: to toss a coin for each sample, whose totals are random.

A sample in two parts would be drawn by both rates without anyone having asked for it, so that is an
error; not so with ``curriculum: sequential``, where each part is a stage of its own and coming back
to the same samples is the point. The draw is made once: every epoch trains the same samples (in
another order), so two epochs at rate 0.5 see half of the samples twice, not all of them once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megasft.errors import DataError
from megasft.mixture import Mixture, Part
from megasft.schema import NO_CATEGORY

_NAMED: Final = 8
"""Categories or sources a message names at most."""
_SUFFIXES: Final = {
    *(".jsonl", ".ndjson", ".json", ".gz", ".zst", ".parquet", ".arrow", ".feather"),
}
"""What a source may be called without."""


@dataclass(frozen=True, slots=True)
class Population:
    """What there is to draw from.

    Attributes:
        source_of: int [S]. Source of each sample.
        category_of: int [S]. Category id of each sample, ``NO_CATEGORY`` for none.
        sources: Paths each source goes by: the file, and the folder or store it belongs to.
        categories: Name of each category id.
    """

    source_of: npt.NDArray[np.integer[Any]]
    category_of: npt.NDArray[np.integer[Any]]
    sources: Sequence[tuple[str, ...]]
    categories: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.source_of)

    def describe(self, samples: npt.NDArray[np.int64]) -> str:
        """Name the categories and sources of some samples, for a message."""
        ids = np.unique(self.category_of[samples]).tolist()
        names = [self.categories.get(i, str(i)) if i != NO_CATEGORY else "(none)" for i in ids]
        files = [self.sources[i][0] for i in np.unique(self.source_of[samples]).tolist()]
        return f"categories {_some(names)}; sources {_some(files)}"


class Drawn(NamedTuple):
    """What became of a part: samples it found, and samples drawn from them in all stages."""

    name: str
    found: int
    drawn: int


class Stage(NamedTuple):
    """Samples that are trained together.

    Attributes:
        name: What messages call it.
        samples: int64. Indices into the population; a sample drawn twice is there twice.
    """

    name: str
    samples: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """The samples of an epoch, stage by stage.

    Attributes:
        curriculum: One of ``mixture.CURRICULA``.
        stages: In the order they are trained; none is empty.
        parts: What became of each part, and of the rest.
        warnings: What the user should know.
    """

    curriculum: str
    stages: tuple[Stage, ...]
    parts: tuple[Drawn, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of_everything(cls, num_samples: int) -> Self:
        """Return the draw of every sample once."""
        return cls("mixed", (Stage("mixed", np.arange(num_samples)),), (), ())

    @property
    def identity(self) -> str:
        """Everything rows depend on: the samples themselves, whatever file led to them."""
        digest = hashlib.sha256()
        for stage in self.stages:
            digest.update(len(stage.samples).to_bytes(8, "little"))
            digest.update(stage.samples.astype("<i8").tobytes())
        return f"mixture {self.curriculum} {digest.hexdigest()[:16]}"


class _Found(NamedTuple):
    """A part (or the rest), the samples it chooses and how many are wanted of them."""

    part: Part
    samples: npt.NDArray[np.int64]
    wanted: int


def draw(mixture: Mixture, population: Population, *, seed: int) -> Draw:
    """Draw the samples of an epoch.

    Args:
        mixture: What to draw.
        population: What there is.
        seed: Of the draw, where the mixture names none.

    Raises:
        DataError: A part finds nothing or is ambiguous, two parts share samples, or samples are in
            no part and the mixture does not say what becomes of them.
    """
    seed = seed if mixture.seed is None else mixture.seed
    warnings: list[str] = []
    samples = [_chosen(part, mixture, population, warnings) for part in mixture.parts]
    rest = _rest(mixture, samples, population)
    counts = _counts(mixture, [len(chosen) for chosen in samples])
    found = [_Found(*three) for three in zip(mixture.parts, samples, counts, strict=True)]
    if len(rest):
        kept = len(rest) if mixture.rest == "keep" else 0
        found.append(_Found(Part(f"in no part ({mixture.rest})"), rest, kept))
    stages, drawn = _stages(mixture, found, seed)
    if not stages:
        raise DataError(f"{mixture.path} draws none of {len(population):,} samples; raise a rate")
    parts = tuple(
        Drawn(one.part.name, len(one.samples), num) for one, num in zip(found, drawn, strict=True)
    )
    return Draw(mixture.curriculum, stages, parts, tuple(warnings))


def _chosen(
    part: Part, mixture: Mixture, population: Population, warnings: list[str]
) -> npt.NDArray[np.int64]:
    is_in = np.ones(len(population), bool)
    if part.source:
        is_named = _sources_named(part.source, mixture.path, population.sources)
        is_in &= is_named[population.source_of]
    if part.category or part.category_id is not None:
        is_in &= population.category_of == _category_id(part, mixture, population, warnings)
    samples = np.flatnonzero(is_in)
    if not len(samples) and not part.may_be_empty:
        everything = population.describe(np.arange(len(population)))
        raise DataError(
            f"{mixture.path}: {part.name} finds none of {len(population):,} samples ({everything});"
            " mend the part, or remove it"
        )
    if part.size is not None and part.size != len(samples):
        warnings.append(
            f"{mixture.path}: {part.name} has size {part.size:,}, and {len(samples):,} samples are "
            "found; the rate is applied to those found"
        )
    return samples


def _sources_named(
    name: str, file: Path, sources: Sequence[tuple[str, ...]]
) -> npt.NDArray[np.bool_]:
    """Say which sources a name means: those of that path, or else the one so called."""
    paths = {path for of_source in sources for path in of_source}
    wanted = {Path(name).resolve(), (file.parent / name).resolve()}
    owners = {path for path in paths if path == name or Path(path).resolve() in wanted}
    if not owners:
        owners = {path for path in paths if name in (Path(path).name, _bare_name(path))}
    if len(owners) > 1 and len({Path(path).resolve() for path in owners}) > 1:
        raise DataError(
            f"{file}: source {name} is {_some(sorted(owners))}; write the path of the one you mean"
        )
    return np.array([not owners.isdisjoint(of_source) for of_source in sources], bool)


def _bare_name(path: str) -> str:
    """Return what a file is called without its suffixes.

    Example:
        >>> _bare_name("data/maths.jsonl.gz")
        'maths'
    """
    name = Path(path)
    while name.suffix in _SUFFIXES:
        name = name.with_suffix("")
    return name.name


def _category_id(part: Part, mixture: Mixture, population: Population, warnings: list[str]) -> int:
    """Return the id a part means: of its name where the data has that, or else its own id."""
    number, categories = part.category_id, population.categories
    if number == NO_CATEGORY or not part.category:
        assert number is not None
        return number
    ids = [i for i, name in categories.items() if name == part.category]
    if ids:
        if number not in (None, ids[0]):
            warnings.append(
                f"{mixture.path}: category {part.category} is {number} there and {ids[0]} in the "
                "data; the name counts"
            )
        return ids[0]
    if number is None:
        raise DataError(
            f"{mixture.path}: no sample has category {part.category}; there are "
            f"{_some([*categories.values()])}"
        )
    if categories.get(number, str(number)) != str(number):
        raise DataError(
            f"{mixture.path}: category {number} is {part.category} there and {categories[number]} "
            "in the data; is it the file of other data?"
        )
    return number


def _rest(
    mixture: Mixture, chosen: list[npt.NDArray[np.int64]], population: Population
) -> npt.NDArray[np.int64]:
    """Return the samples no part chooses, after checking that no two parts choose one."""
    chooser = np.full(len(population), -1, np.int32)
    for i, samples in enumerate(chosen):
        twice = samples[chooser[samples] >= 0]
        if len(twice) and mixture.curriculum != "sequential":
            other = mixture.parts[int(chooser[twice[0]])]
            raise DataError(
                f"{mixture.path}: {len(twice):,} samples are in two parts ({other.name}; "
                f"{mixture.parts[i].name}) and would be drawn by both; give a part its source and "
                "its category, or set curriculum: sequential to train them in two stages"
            )
        chooser[samples] = i
    rest = np.flatnonzero(chooser < 0)
    if len(rest) and mixture.rest == "error":
        raise DataError(
            f"{mixture.path}: {len(rest):,} of {len(population):,} samples are in no part "
            f"({population.describe(rest)}); name them, or set rest: keep or rest: drop"
        )
    return rest


def _counts(mixture: Mixture, found: list[int]) -> list[int]:
    """Return how many samples each part gives."""
    parts = mixture.parts
    if parts[0].weight is None:
        counts = [
            floor(part.sample_rate * num + Fraction(1, 2))
            for part, num in zip(parts, found, strict=True)
        ]
    else:
        total = sum(found) if mixture.total is None else mixture.total
        counts = _apportion(total, [part.weight or Fraction(0) for part in parts])
    return [
        count if part.max_samples is None else min(count, part.max_samples)
        for part, count in zip(parts, counts, strict=True)
    ]


def _apportion(total: int, weights: list[Fraction]) -> list[int]:
    """Split a number by weights without losing one: the largest remainders are rounded up.

    Example:
        >>> _apportion(10, [Fraction(1), Fraction(1), Fraction(1)])
        [4, 3, 3]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _stages(
    mixture: Mixture, found: list[_Found], seed: int
) -> tuple[tuple[Stage, ...], list[int]]:
    """Return the stages that hold samples, and the samples drawn of each part."""
    plans: list[tuple[str, list[tuple[int, int]]]]  # (stage, [(part, samples), ...])
    counted = [(i, one.wanted) for i, one in enumerate(found)]
    if mixture.curriculum == "sequential":
        plans = [(found[i].part.name, [(i, count)]) for i, count in counted]
    elif mixture.curriculum == "two-stage":
        first = [(i, count) for i, count in counted if found[i].part.specialised]
        again = [(i, floor(mixture.replay * count + Fraction(1, 2))) for i, count in first]
        second = [(i, count) for i, count in counted if not found[i].part.specialised]
        plans = [("specialised", first), ("general", [*second, *again])]
    else:
        plans = [("mixed", counted)]
    drawn = [0] * len(found)
    stages = []
    for number, (name, wanted) in enumerate(plans):
        pieces = []
        for i, count in wanted:
            rng = _generator(seed, number, found[i].part.name)
            pieces.append(_take(found[i].samples, count, rng))
            drawn[i] += len(pieces[-1])
        samples = np.concatenate(pieces)
        if len(samples):
            stages.append(Stage(name, samples))
    return tuple(stages), drawn


def _generator(seed: int, stage: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, stage, int.from_bytes(digest[:8], "little")])


def _take(
    samples: npt.NDArray[np.int64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Take so many: each as often as every other, or once more."""
    if not len(samples):
        return samples
    copies, once_more = divmod(count, len(samples))
    times = np.full(len(samples), copies)
    times[rng.choice(len(samples), once_more, replace=False, shuffle=False)] += 1
    return np.repeat(samples, times)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
