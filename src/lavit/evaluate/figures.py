"""A judged figure: its value with count and 95 % interval, beside what a trivial answer and the best possible one get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Figure:
    """One number of a report. `floor` and `ceiling` are (what it is, value) pairs."""

    name: str
    value: float
    low: float
    high: float
    count: int
    floor: tuple[str, float] | None = None
    ceiling: tuple[str, float] | None = None
    note: str = ""

    def line(self) -> str:
        """The figure as one line of a report."""
        text = f"{self.name:<44} {self.value:7.3f}  [{self.low:.3f}, {self.high:.3f}]  n={self.count}"
        if self.floor:
            text += f"  floor {self.floor[1]:.3f} ({self.floor[0]})"
        if self.ceiling:
            text += f"  ceiling {self.ceiling[1]:.3f} ({self.ceiling[0]})"
        return text + (f"  {self.note}" if self.note else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def share(
    name: str,
    hits: Sequence[bool],
    *,
    floor: tuple[str, float] | None = None,
    ceiling: tuple[str, float] | None = None,
    note: str = "",
) -> Figure:
    """Share of hits with Wilson's interval."""
    n, p = len(hits), sum(hits) / max(1, len(hits))
    denominator = 1 + Z**2 / max(1, n)
    centre = (p + Z**2 / (2 * max(1, n))) / denominator
    half = Z * math.sqrt(p * (1 - p) / max(1, n) + Z**2 / (4 * max(1, n) ** 2)) / denominator
    return Figure(name, p, max(0.0, centre - half), min(1.0, centre + half), n, floor, ceiling, note)


def mean(
    name: str,
    values: Sequence[float],
    *,
    floor: tuple[str, float] | None = None,
    ceiling: tuple[str, float] | None = None,
    note: str = "",
) -> Figure:
    """Mean with a normal interval."""
    array = np.asarray(values, dtype=np.float64)
    half = Z * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    centre = float(array.mean())
    return Figure(name, centre, centre - half, centre + half, len(array), floor, ceiling, note)


def plain(name: str, value: float, count: int, *, note: str = "") -> Figure:
    """A figure without an interval (a count over everything there is)."""
    return Figure(name, value, value, value, count, note=note)
