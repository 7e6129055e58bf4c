"""Memory: what was said of the training pictures that are most like the one being read, told to the LM beside it.

A small LM that has seen a few hundred thousand tokens of pictures reads its table far better than a row of features. So the
texts of the nearest training pictures may stand behind a picture that is read, a line each, nearest first (the method of
SmallCap, arXiv 2209.15323, whose retrieval is CLIP's; LaVIT has none, and `LanguageConfig.recall` is 0 for its sizes):

    S f f f E  tiger face ⏎ cat face ⏎ lion ⏎ leopard ⏎  cat .

Pictures are compared by their encoder features: the mean patch and those of the four quarters, under a metric in closed
form that counts what tells texts apart and discounts what varies between pictures of the same text, and between the views of
one picture (linear discriminant analysis). Nothing here is trained by gradient, and pictures can be added at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.config import InputError

DIRECTIONS = 128  # of the metric, at most
NOISE = 0.1  # variance that every direction of a description has within a text, as a share of the mean one
QUARTERS = 2  # per side
STATE = ("keys", "mean", "metric", "owners")


def describe(patches: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images described"]:
    """The mean patch of the picture and of its quarters, 5·dim numbers; patches form a square grid."""
    images, patches_, dim = patches.shape
    side = round(patches_**0.5)
    if side * side != patches_:
        raise InputError(f"{patches_} patches form no square grid: a memory needs one")
    grid = patches.float().transpose(1, 2).reshape(images, dim, side, side)
    parts = [grid.mean((2, 3)), F.adaptive_avg_pool2d(grid, QUARTERS).flatten(2).transpose(1, 2).flatten(1)]
    return torch.cat(parts, 1)


def discriminant(
    described: Float[Tensor, "pictures described"],
    owners: Int[Tensor, "pictures"],
    views: Float[Tensor, "others described"],
) -> tuple[Float[Tensor, "described"], Float[Tensor, "described directions"]]:
    """Mean, and the directions that vary most in units of what varies within a text (and in `views`: differences of views)."""
    mean = described.mean(0)
    centred = described - mean
    count = owners.bincount()
    own = torch.zeros(len(count), described.shape[1]).index_add_(0, owners, centred) / count[:, None].clamp(min=1)
    inside = (centred - own[owners])[count[owners] > 1]
    free = int((count - 1).clamp(min=0).sum())
    within = inside.T @ inside / max(1, free) + views.T @ views / max(1, len(views))
    total = centred.T @ centred / len(centred)
    level = within.diagonal().mean() or total.diagonal().mean()
    within = within + NOISE * level * torch.eye(len(within))
    values, vectors = torch.linalg.eigh(within.double())
    white = vectors * values.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    vectors = torch.linalg.eigh(white.T @ total.double() @ white).eigenvectors.flip(1)
    return mean, (white @ vectors[:, :DIRECTIONS]).float()


class Memory(nn.Module):
    """Texts, and keys of the pictures that they were said of."""

    def __init__(self, texts: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """`tensors` are the state of a memory; its `owners` are the numbers of its pictures' texts."""
        super().__init__()
        self.texts = tuple(texts)
        if set(tensors) != set(STATE) or int(tensors["owners"].max()) >= len(self.texts):
            raise InputError(
                f"a memory of {len(self.texts)} texts has tensors {sorted(tensors)}, expected {list(STATE)}"
            )
        for name in STATE:
            self.register_buffer(name, tensors[name] if name == "owners" else tensors[name].float())

    @classmethod
    def of(
        cls,
        described: Float[Tensor, "pictures described"],
        texts: Sequence[str],
        views: Float[Tensor, "others described"],
    ) -> Memory:
        """A memory of pictures, a text of each; `views` are differences of descriptions of one picture (none: 0 rows)."""
        if not texts:
            raise InputError("nothing is said of the pictures, so a memory would be empty: set recall to 0")
        numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
        owners = torch.tensor([numbers[text] for text in texts])
        mean, metric = discriminant(described, owners, views)
        found = cls(tuple(numbers), {"mean": mean, "metric": metric, "keys": described, "owners": owners})
        found.keys = found.keys_of(described)
        return found

    def add(self, described: Float[Tensor, "pictures described"], texts: Sequence[str]) -> None:
        """More pictures, under the metric that is there."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys((*self.texts, *texts)))}
        owners = torch.tensor([numbers[text] for text in texts], device=self.owners.device)
        self.keys = torch.cat([self.keys, self.keys_of(described)])
        self.owners = torch.cat([self.owners, owners.to(self.owners)])
        self.texts = tuple(numbers)

    def keys_of(self, described: Float[Tensor, "images described"]) -> Float[Tensor, "images directions"]:
        """Unit vectors that are compared by their cosines."""
        return F.normalize((described - self.mean) @ self.metric, dim=1)

    def likeness(self, described: Float[Tensor, "images described"]) -> Float[Tensor, "images pictures"]:
        """Cosines with every picture of the memory."""
        return self.keys_of(described) @ self.keys.T

    def nearest(self, likeness: Float[Tensor, "images pictures"], count: int) -> list[list[str]]:
        """The `count` texts (or all) whose nearest picture is most alike, best first."""
        best = torch.full((len(likeness), len(self.texts)), -torch.inf, device=likeness.device)
        best = best.scatter_reduce(1, self.owners.expand(len(likeness), -1), likeness, "amax")
        ranked = best.topk(min(count, len(self.texts)), dim=1)
        pairs = zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        return [[self.texts[n] for v, n in zip(*row, strict=True) if v > -torch.inf] for row in pairs]

    @torch.no_grad()
    def recall(self, patches: Float[Tensor, "images patches dim"], count: int) -> list[list[str]]:
        """Texts of the training pictures most like these, `count` of each, nearest first."""
        return self.nearest(self.likeness(describe(patches)), count)
