"""How sure a difference between two arms is: a bootstrap over seeds and items at once.

Both arms answer the same items, and seed n of one is paired with seed n of the other. Seeds and
items are drawn again independently of each other (a crossed design), 2,000 times. Three seeds say
little about how seeds spread, so an interval alone settles nothing: all seeds must agree in sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """Mean of one arm's values minus the other's, its 95 % interval, and that of each seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def settled(self) -> bool:
        """Whether all seeds agree in sign and the interval excludes 0."""
        one_sided = all(d > 0 for d in self.seeds) or all(d < 0 for d in self.seeds)
        return len(self.seeds) > 1 and one_sided and (self.low > 0 or self.high < 0)

    def verdict(self, claimed: int) -> str:
        """What it says of a claimed sign (0: none was claimed)."""
        if not self.settled:
            return "not settled"
        if not claimed:
            return "more" if self.value > 0 else "less"
        return "as claimed" if self.value * claimed > 0 else "against the claim"


def paired_difference(
    one: Float[np.ndarray, "seeds items"], other: Float[np.ndarray, "seeds items"]
) -> Difference:
    """The difference of two arms, whose rows are seeds and whose columns are the same items."""
    apart = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    seeds, items = apart.shape
    rng = np.random.default_rng(0)
    # how often each seed and each item is drawn
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    of_items = rng.multinomial(items, np.full(items, 1 / items), size=DRAWS)
    drawn = ((of_seeds @ apart) * of_items).sum(1) / (seeds * items)
    low, high = np.percentile(drawn, (2.5, 97.5))
    each = tuple(float(value) for value in apart.mean(1))
    return Difference(float(apart.mean()), float(low), float(high), each)
