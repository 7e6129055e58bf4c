"""How pictures that are read enter the language model (paper Sec. 3.2): rows of its width.

A reader takes features and the mask of kept patches. How many rows it makes of a picture is its own
affair; where they are as many as the picture has codes, the codes can be their targets (Eq. 6).
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.merger import BaseMerger


class Reader(nn.Module):
    """Patches and keep to packed rows."""

    language: ClassVar[Any]  # class of the language part that reads by it: `Language`, or a rival
    # classes of its training, where they are not the usual ones: documents and stage
    documents: ClassVar[Any] = None
    stage: ClassVar[Any] = None

    @classmethod
    def beside(cls, merger: BaseMerger, width: int, **sizes: Any) -> Reader:
        """A new one for an LM of `width`, where stage 1 has this merger."""
        return cls(merger.dim, width, **sizes)

    @abstractmethod
    def rows(self, kept: int) -> int:
        """How many rows a picture with so many kept patches enters as."""

    @abstractmethod
    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """Rows of pictures, packed one after the other."""


class MergerReader(Reader):
    """LaVIT's: a merger, which starts as stage 1's, and a projection; a row for each code."""

    def __init__(self, merger: BaseMerger, width: int) -> None:
        super().__init__()
        self.merger = merger
        self.to_language = projection(merger.dim, width)

    @classmethod
    def beside(cls, merger: BaseMerger, width: int, **sizes: Any) -> Reader:
        """One that begins with a copy of the merger."""
        return cls(deepcopy(merger), width, **sizes)

    def rows(self, kept: int) -> int:
        """As many as kept patches."""
        return kept

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "kept width"]:
        """Merged rows of the kept patches, projected."""
        return self.to_language(self.merger(patches, keep))


def projection(dim: int, width: int) -> nn.Linear:
    """The last layer of a reader."""
    linear = nn.Linear(dim, width)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return linear
