"""A judged figure: its value with count and 95 % interval, between what a trivial answer and the
best possible one get.

Shares have Wilson's interval, means a normal one; what is not a mean (ratios, rank correlations) is
bootstrapped over items, with draws that are always the same. A figure that a model cannot have has
no value, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

Z = 1.959964  # of a 95 % interval
DRAWS = 1000  # of a bootstrap
APART = 4  # prompts of 1, 2, 3 and 4 things come in turn: another prompt of as many things

T = TypeVar("T")
Level = tuple[str, float]  # what it is, and its value
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Figure:
    """One number of a report; `value` None: it cannot be had, and `note` says why."""

    value: float | None
    low: float | None
    high: float | None
    count: int
    floor: Level | None = None
    ceiling: Level | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # further numbers
    items: tuple[float, ...] = ()  # whose mean the value is, where it is one

    def entry(self) -> dict[str, Any]:
        """Plain data as `lavit eval --json` writes it: numbers, and what they are."""
        found: dict[str, Any] = {
            "value": _short(self.value),
            "low": _short(self.low),
            "high": _short(self.high),
            "count": self.count,
            "floor": _short(self.floor[1]) if self.floor else None,
            "ceiling": _short(self.ceiling[1]) if self.ceiling else None,
        }
        if self.floor:
            found["floor_is"] = self.floor[0]
        if self.ceiling:
            found["ceiling_is"] = self.ceiling[0]
        if self.note:
            found["reason" if self.value is None else "note"] = self.note
        if self.details:
            found["details"] = {name: _short(value) for name, value in self.details.items()}
        return found


def _short(value: Any) -> Any:
    """Seven digits of a number: more would depend on the order of sums."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def average(values: Values) -> float:
    """The mean of values, as a plain number."""
    return float(np.mean(values))


def averages(keys: Sequence[str], values: Values) -> dict[str, float]:
    """The mean of the values of each key."""
    found: dict[str, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key.replace(" ", "_"), []).append(value)
    return {key: average(found[key]) for key in sorted(found)}


# `beside` of the following are the last fields of a figure: floor, ceiling, note, details


def share(hits: Sequence[bool], **beside: Any) -> Figure:
    """Share of hits with Wilson's interval."""
    n = max(1, len(hits))
    p = sum(hits) / n
    denominator = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / denominator
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / denominator
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Figure(p, low, high, len(hits), items=tuple(map(float, hits)), **beside)


def mean(
    values: Values, *, within: tuple[float, float] = (-math.inf, math.inf), **beside: Any,
) -> Figure:  # fmt: skip
    """Mean with a normal interval, cut where values cannot lie."""
    array = np.asarray(values, dtype=np.float64)
    half = Z * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    centre = float(array.mean())
    low, high = max(within[0], float(centre - half)), min(within[1], float(centre + half))
    return Figure(centre, low, high, len(array), items=tuple(array.tolist()), **beside)


def plain(value: float, count: int, *, note: str = "") -> Figure:
    """A figure without an interval (a count over everything there is)."""
    return Figure(value, value, value, count, note=note)


def nothing(reason: str) -> Figure:
    """A figure that cannot be had."""
    return Figure(None, None, None, 0, note=reason)


def bootstrapped(statistic: Callable[[np.ndarray], float], count: int, **beside: Any) -> Figure:
    """A statistic of items, a function of their numbers, with percentiles of resamplings."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(DRAWS)]
    low, high = (float(x) for x in np.percentile(drawn, (2.5, 97.5)))
    return Figure(float(statistic(np.arange(count))), low, high, count, **beside)


def ratio(over: Values, under: Values, **beside: Any) -> Figure:
    """Mean of one thing over the mean of another, item by item; 0 where the second is 0."""
    a, b = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)

    def quotient(at: np.ndarray) -> float:
        below = float(b[at].mean())
        return float(a[at].mean()) / below if below else 0.0

    below = float(b.mean())
    items = tuple((a / below).tolist()) if below else ()  # as shares of that mean
    return bootstrapped(quotient, len(a), items=items, **beside)


def ranks(values: Values) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    _, place, count = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def spearman(a: Values, b: Values, given: Values | None = None) -> float:
    """Rank correlation; with `given`, the part of it that is left when that is held constant. What
    is constant follows nothing: 0.
    """
    columns = [ranks(a), ranks(b)]
    if given is not None:
        held = np.stack([np.ones(len(columns[0])), ranks(given)], 1)
        fits = [held @ np.linalg.lstsq(held, column, rcond=None)[0] for column in columns]
        columns = [column - fit for column, fit in zip(columns, fits, strict=True)]
    x, y = (column - column.mean() for column in columns)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 1e-9 else 0.0


def turned(items: Sequence[T], by: int = APART) -> list[T]:
    """The same items, each in another's place (one alone stays)."""
    by = by if len(items) > by else 1
    return [*items[by:], *items[:by]]
