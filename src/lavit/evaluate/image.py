"""How good written pictures are: which real picture is nearest to them in the frozen encoder's features.

The kernel distance is KID's (arXiv 1801.01401: polynomial kernel, unbiased) on the encoder's mean patch; it must bear the
encoder's name. Retrieval is over the pooled (mean) features of every real picture of the data set, all names. No FID here:
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

from lavit.config import InputError
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


def kernel_distances(
    written: Float[Tensor, "pictures dim"], real: Float[Tensor, "pictures dim"]
) -> Float[Tensor, "pictures"]:
    """Jackknife values of the squared kernel distance, one per picture; their mean is the unbiased estimate.

    Row i of both is the same picture: the pairs (i, i) stay out of all three sums (Gretton et al. 2012, Lemma 6).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    pairs = kernel(written, written) + kernel(real, real) - kernel(written, real) - kernel(real, written)
    rows, n = pairs.fill_diagonal_(0).sum(1), len(pairs)
    if n < 3:
        raise InputError(f"a kernel distance needs 3 pictures or more, not {n}: raise the limit")
    return (rows.sum() / (n - 1) - (rows.sum() - 2 * rows) / (n - 2)).float()


def cosines(
    written: Float[Tensor, "pictures patches dim"], real: Float[Tensor, "pictures patches dim"]
) -> Float[Tensor, "pictures"]:
    """Mean cosine over the patches of each picture."""
    return F.cosine_similarity(written.float(), real.float(), dim=-1).mean(1)
