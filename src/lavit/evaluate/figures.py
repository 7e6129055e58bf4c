"""A judged figure: its value with count and 95 % interval, between what a trivial answer and the
best possible one get.

Shares have Wilson's interval, means a normal one; what is no mean (ratios, rank correlations) is
bootstrapped over items, with draws that are always the same. A figure that a model cannot have has
no value, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

Z = 1.959964  # of a 95 % interval
DRAWS = 1000  # of a bootstrap

Level = tuple[str, float]  # what it is, and its value
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Figure:
    """One number of a report; `value` None: it cannot be had, and `note` says why."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    count: int
    floor: Level | None = None
    ceiling: Level | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # figures beside it

    def line(self) -> str:
        """The figure as one line of a report."""
        if self.value is None:
            return f"{self.name:<44}    none  {self.note}"
        text = f"{self.name:<44} {self.value:7.3f}  [{self.low:.3f}, {self.high:.3f}]  n={self.count}"
        if self.floor:
            text += f"  floor {self.floor[1]:.3f} ({self.floor[0]})"
        if self.ceiling:
            text += f"  ceiling {self.ceiling[1]:.3f} ({self.ceiling[0]})"
        return text + (f"  {self.note}" if self.note else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def entry(self) -> dict[str, Any]:
        """Plain data as `lavit eval --json` writes it: numbers, and beside them what they are."""
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
    """Seven digits of a number: more would hang on how a machine adds up."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def share(
    name: str,
    hits: Sequence[bool],
    *,
    floor: Level | None = None,
    ceiling: Level | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
) -> Figure:
    """Share of hits with Wilson's interval."""
    n, p = len(hits), sum(hits) / max(1, len(hits))
    denominator = 1 + Z**2 / max(1, n)
    centre = (p + Z**2 / (2 * max(1, n))) / denominator
    half = Z * math.sqrt(p * (1 - p) / max(1, n) + Z**2 / (4 * max(1, n) ** 2)) / denominator
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Figure(name, p, low, high, n, floor, ceiling, note, details or {})


def mean(
    name: str,
    values: Sequence[float],
    *,
    floor: Level | None = None,
    ceiling: Level | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """Mean with a normal interval, cut where values cannot lie."""
    array = np.asarray(values, dtype=np.float64)
    half = Z * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    centre = float(array.mean())
    low, high = max(within[0], float(centre - half)), min(within[1], float(centre + half))
    return Figure(name, centre, low, high, len(array), floor, ceiling, note, details or {})


def plain(name: str, value: float, count: int, *, note: str = "") -> Figure:
    """A figure without an interval (a count over everything there is)."""
    return Figure(name, value, value, value, count, note=note)


def nothing(name: str, reason: str) -> Figure:
    """A figure that cannot be had."""
    return Figure(name, None, None, None, 0, note=reason)


def bootstrapped(
    name: str,
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    floor: Level | None = None,
    ceiling: Level | None = None,
    note: str = "",
    details: Mapping[str, Any] | None = None,
) -> Figure:
    """A statistic of items, given as a function of their numbers, with the percentiles of
    resamplings.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(DRAWS)]
    low, high = (float(x) for x in np.percentile(drawn, (2.5, 97.5)))
    value = float(statistic(np.arange(count)))
    return Figure(name, value, low, high, count, floor, ceiling, note, details or {})


def ratio(name: str, over: Values, under: Values, **options: Any) -> Figure:
    """Mean of one thing over the mean of another, item by item; 0 where the second is 0."""
    a, b = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)

    def quotient(at: np.ndarray) -> float:
        below = float(b[at].mean())
        return float(a[at].mean()) / below if below else 0.0

    return bootstrapped(name, quotient, len(a), **options)


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
        columns = [column - held @ np.linalg.lstsq(held, column, rcond=None)[0] for column in columns]
    x, y = (column - column.mean() for column in columns)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 1e-9 else 0.0
