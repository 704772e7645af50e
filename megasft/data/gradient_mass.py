"""Which share of the loss each category and length gets, weighting by token, sample or turn.

A label weighs 1, 1 / labels of its sample, or 1 / labels of its turn (``loss/objectives.py``),
times the weight of its turn, so those of a group of turns add up to

    token    Σ over its turns of  weight x labels
    sample   Σ over its turns of  weight x labels / labels of the turn's sample
    turn     Σ over its turns of  weight

and its share is that over the same sum of the whole store. All of it follows from the turn records,
without a model: at equal cross entropy these are shares of the loss, and at any cross entropy the
factors on each label's gradient. Sums are fractions, not floats: shares add up to exactly 1, and
1,000 categories at 0.1 % stay so. Turns of one group whose samples have equally many labels are
added as integers first, so the cost is one fraction per distinct number of labels. Weights are
integers for that, the largest one 2 ** 20.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megasft.data.report import Bin, bin_of, category_names
from megasft.schema import TURN_FIELDS, turn_weights_of
from megasft.store import TokenStore

WEIGHTINGS: Final = ("token", "sample", "turn")
"""Objectives in the order in which they take weight from long answers."""
_TICKS: Final = 2**20
"""The largest weight of a turn, as an integer."""


class Mass(NamedTuple):
    """What the labels of a group weigh together, under each of ``WEIGHTINGS``."""

    token: Fraction
    sample: Fraction
    turn: Fraction


class MassRow(NamedTuple):
    """A group of turns and its shares of the loss.

    Attributes:
        name: Its category, or its range of lengths.
        num_turns: Turns with at least one label.
        num_labels: Label tokens.
        shares: Fractions of the whole store, in ``[0, 1]``; each adds up to 1 over all rows.
    """

    name: str
    num_turns: int
    num_labels: int
    shares: Mass


class _Turns(NamedTuple):
    """All turns of a store that have a label; int64 [N] each."""

    sample: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    category: npt.NDArray[np.int64]
    sample_labels: npt.NDArray[np.int64]
    weight: npt.NDArray[np.int64]


def mass_by_category(store: TokenStore) -> list[MassRow]:
    """Return the shares of each category, in the order of their ids."""
    turns, names = _turns(store), category_names(store)
    return _rows(turns, turns.category, lambda i: names.get(i, str(i)))


def mass_by_sample_length(store: TokenStore) -> list[MassRow]:
    """Return the shares of samples by their length in tokens, in the bins of the histogram."""
    turns = _turns(store)
    return _rows(turns, bin_of(store.tokens.lengths)[turns.sample], _range)


def mass_by_turn_length(store: TokenStore) -> list[MassRow]:
    """Return the shares of turns by their number of labels, in the bins of the histogram."""
    turns = _turns(store)
    return _rows(turns, bin_of(turns.labels), _range)


def _range(exponent: int) -> str:
    return Bin.at(exponent, 0).name


def _turns(store: TokenStore) -> _Turns:
    width = len(TURN_FIELDS)
    raw = store.turns.values.reshape(-1, width)
    weights = turn_weights_of(raw).astype(np.float64)
    ticks = np.rint(weights * (_TICKS / weights.max(initial=1e-38))).astype(np.int64)
    records = raw.astype(np.int64)
    labels = records[:, TURN_FIELDS.index("num_tokens")]
    sample = np.repeat(np.arange(len(store)), np.diff(store.turns.offsets // width))
    per_sample = np.zeros(len(store), np.int64)
    np.add.at(per_sample, sample, labels)
    category = records[:, TURN_FIELDS.index("category_id")]
    has_label = labels > 0
    return _Turns(*(v[has_label] for v in (sample, labels, category, per_sample[sample], ticks)))


def _rows(
    turns: _Turns, groups: npt.NDArray[np.int64], name: Callable[[int], str]
) -> list[MassRow]:
    masses = {int(g): _mass(turns, groups == g) for g in np.unique(groups)}
    whole = _mass(turns, np.ones(len(groups), bool))
    return [
        MassRow(
            name(group),
            int((groups == group).sum()),
            int(turns.labels[groups == group].sum()),
            Mass(*(part / total for part, total in zip(mass, whole, strict=True))),
        )
        for group, mass in masses.items()
    ]


def _mass(turns: _Turns, chosen: npt.NDArray[np.bool_]) -> Mass:
    weight = turns.weight[chosen]
    labels = turns.labels[chosen] * weight
    denominators, place = np.unique(turns.sample_labels[chosen], return_inverse=True)
    numerators = np.zeros(len(denominators), np.int64)
    np.add.at(numerators, place, labels)
    terms = [
        Fraction(n, d) for n, d in zip(numerators.tolist(), denominators.tolist(), strict=True)
    ]
    return Mass(Fraction(int(labels.sum())), _sum(terms), Fraction(int(weight.sum())))


def _sum(terms: list[Fraction]) -> Fraction:
    """Add in pairs: denominators grow as slowly as they can (10,000 terms: 0.1 s)."""
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2], Fraction(0)) for i in range(0, len(terms), 2)]
    return terms[0] if terms else Fraction(0)
