"""Choices at random: one of some items, by shares, and items in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")


def pick(rng: Rng, items: Sequence[T]) -> T:
    """One of some items."""
    return items[int(rng.integers(len(items)))]


def weighted(rng: Rng, shares: Mapping[str, float]) -> str:
    """One of some names, as often as their shares say."""
    share = np.array(list(shares.values()))
    return tuple(shares)[int(rng.choice(len(share), p=share / share.sum()))]


def shuffled(rng: Rng, items: Sequence[T], most: int | None = None) -> list[T]:
    """Items in any order; the first `most` of them."""
    return [items[n] for n in rng.permutation(len(items))[:most]]
