"""How good written pictures are: which real picture is nearest to them in the frozen encoder's features.

Retrieval is over the pooled (mean) features of every real picture of the data set, all names. No FID here:
its Inception weights are not to be had without a hub, and another encoder's distance must not be called FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit.model import LaVIT


@dataclass(frozen=True)
class Gallery:
    """Pooled features of real pictures and their names."""

    features: Float[Tensor, "pictures dim"]
    names: tuple[str, ...]

    def nearest(
        self, queries: Float[Tensor, "queries dim"], *, exclude: Sequence[int] | None = None
    ) -> list[list[str]]:
        """Names in the order of similarity, each once, for every query; `exclude` leaves out one picture per query."""
        scores = queries @ self.features.T
        if exclude is not None:
            scores[torch.arange(len(queries)), torch.tensor(exclude)] = -torch.inf
        ranked = []
        for order in scores.argsort(dim=1, descending=True, stable=True)[:, :200].tolist():
            ranked.append(list(dict.fromkeys(self.names[i] for i in order)))
        return ranked


def pooled(patches: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images dim"]:
    """Unit vectors: the mean patch of each picture."""
    return F.normalize(patches.float().mean(1), dim=-1)


def embed(model: LaVIT, images: Sequence[Image.Image]) -> Float[Tensor, "images dim"]:
    """Pooled encoder features of pictures."""
    return torch.cat([pooled(model.patches([image])) for image in images])


def shrink(image: Image.Image, size: int) -> Image.Image:
    """A real picture at the decoder's size: the ceiling of every retrieval."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def hits(ranked: Sequence[Sequence[str]], names: Sequence[str], *, top: int = 1) -> list[bool]:
    """Whether the right name is among the first `top`."""
    return [name in order[:top] for order, name in zip(ranked, names, strict=True)]
