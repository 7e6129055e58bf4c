"""Bags of tokens, found by the tokens they share: the rarer a token is, the more it says (TF-IDF, cosine).

An image is a foreign language here, so one index serves both: texts are found by their words, pictures by their codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Bag = Sequence[Hashable]


class Index:
    """An index of bags; a token's weight is log(1 + bags / bags that hold it)."""

    def __init__(self, bags: Sequence[Bag]) -> None:
        held = Counter(token for bag in bags for token in set(bag))
        self.numbers = {token: number for number, token in enumerate(held)}
        self.weights = torch.tensor([len(bags) / count for count in held.values()]).log1p()
        empty = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
        tokens, values = zip(empty, *map(self._weighted, bags), strict=True)
        self.bags = len(bags)
        self.tokens = torch.cat(tokens)
        self.owners = torch.arange(len(bags)).repeat_interleave(
            torch.tensor([len(part) for part in tokens[1:]], dtype=torch.long)
        )
        self.values = torch.cat([part / part.norm() for part in values])

    def _weighted(self, bag: Bag) -> tuple[Int[Tensor, "tokens"], Float[Tensor, "tokens"]]:
        """Numbers of a bag's tokens and their weighted counts; unknown ones do not count."""
        counts = Counter(self.numbers[token] for token in bag if token in self.numbers)
        at = torch.tensor(list(counts), dtype=torch.long)
        return at, torch.tensor(list(counts.values()), dtype=torch.float) * self.weights[at]

    def alike(self, bag: Bag) -> Float[Tensor, "bags"]:
        """Cosine of a bag with each of the index, as far as its tokens are known; 0 where nothing is shared."""
        at, values = self._weighted(bag)
        asked = torch.zeros(len(self.numbers))
        asked[at] = values / values.norm().clamp(min=torch.finfo(torch.float).tiny)
        return torch.zeros(self.bags).index_add_(0, self.owners, self.values * asked[self.tokens])

    def covered(self, bag: Bag) -> Float[Tensor, "bags"]:
        """Share of the weight of each bag of the index that is in tokens of this one."""
        known = torch.zeros(len(self.numbers))
        known[self._weighted(bag)[0]] = 1.0
        return torch.zeros(self.bags).index_add_(0, self.owners, self.values.square() * known[self.tokens])
