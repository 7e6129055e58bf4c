"""Memory: what was said of the training pictures that are most like the one being read, told to the LM beside it.

A small LM that has seen a few hundred thousand tokens of pictures reads its table far better than a row of features. So the
texts of the nearest training pictures may stand behind a picture that is read, a line each, nearest first (the method of
SmallCap, arXiv 2209.15323, whose retrieval is CLIP's; LaVIT has none, and `LanguageConfig.recall` is 0 for its sizes):

    S f f f E  tiger face ⏎ cat face ⏎ lion ⏎ leopard ⏎  cat .

Pictures are compared by what several layers of the encoder see: the mean of the whole and of its four quarters, under a
metric in closed form that counts what tells texts apart and discounts what varies between pictures of the same text, and
between the views of one picture (linear discriminant analysis). And a hand seldom draws one thing twice: of two pictures
that are equally like the one being read, the one in another manner is the likelier to show the same thing. The manner is
the axis along which pictures of one text differ most. Nothing here is trained by gradient, and pictures can be added.
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
MANNER = 0.1  # likeness that a picture in the same manner loses, unless it seems to be the very picture
VERY = 0.98  # cosine from which it does
APART = 0.6  # difference along the manner, in units of the usual one within a text, that makes two manners
STATE = ("keys", "manner", "manners", "mean", "metric", "owners")


def describe(looks: Sequence[Float[Tensor, "images _places _channels"]]) -> Float[Tensor, "images described"]:
    """Means of each look (`Vision.looks`) over the picture and its quarters; places form a square grid."""
    parts = []
    for look in looks:
        images, places, channels = look.shape
        side = round(places**0.5)
        if side * side != places:
            raise InputError(f"{places} patches form no square grid: a memory needs one")
        grid = look.float().transpose(1, 2).reshape(images, channels, side, side)
        parts += [grid.mean((2, 3)), F.adaptive_avg_pool2d(grid, QUARTERS).flatten(2).transpose(1, 2).flatten(1)]
    return torch.cat(parts, 1)


def within_texts(
    described: Float[Tensor, "pictures described"], owners: Int[Tensor, "pictures"]
) -> Float[Tensor, "described described"]:
    """Covariance of the pictures of a text around their mean, over all texts; zeros if no text has two pictures."""
    count = owners.bincount()
    own = torch.zeros(len(count), described.shape[1]).index_add_(0, owners, described) / count[:, None].clamp(min=1)
    inside = (described - own[owners])[count[owners] > 1]
    return inside.T @ inside / max(1, int((count - 1).clamp(min=0).sum()))


def discriminant(
    total: Float[Tensor, "described described"], within: Float[Tensor, "described described"]
) -> Float[Tensor, "described directions"]:
    """The directions that vary most in all, in units of what varies within."""
    level = within.diagonal().mean() or total.diagonal().mean() or 1.0  # nothing varies: one picture
    factor = torch.linalg.cholesky((within + NOISE * level * torch.eye(len(within))).double())
    white = torch.linalg.solve_triangular(factor, total.double(), upper=False)
    white = torch.linalg.solve_triangular(factor, white.T, upper=False).float()
    vectors = torch.linalg.eigh((white + white.T) / 2).eigenvectors.flip(1)[:, :DIRECTIONS]
    return torch.linalg.solve_triangular(factor.T, vectors.double(), upper=True).float()


def first_axis(within: Float[Tensor, "described described"]) -> Float[Tensor, "described"]:
    """The axis along which two pictures of a text differ most, in units of that difference; zeros if they do not."""
    values, vectors = torch.linalg.eigh(within)
    varies = values[-1] > torch.finfo(values.dtype).eps
    return vectors[:, -1] / (2 * values[-1]) ** 0.5 if varies else torch.zeros(len(within))


class Memory(nn.Module):
    """Texts, and keys and manners of the pictures that they were said of."""

    def __init__(self, texts: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """`tensors` are the state of a memory; its `owners` are the numbers of its pictures' texts."""
        super().__init__()
        self.texts = tuple(texts)
        if set(tensors) != set(STATE) or bool((tensors["owners"] >= len(self.texts)).any()):
            raise InputError(
                f"a memory of {len(self.texts)} texts has tensors {sorted(tensors)}, expected {list(STATE)}: "
                "train its language stage again"
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
        mean, spread = described.mean(0), described.std(0, correction=0)
        spread = spread.where(spread > 0, 1.0)
        numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
        centred, views = (described - mean) / spread, views / spread
        within = within_texts(centred, torch.tensor([numbers[text] for text in texts]))
        metric = discriminant(centred.T @ centred / len(centred), within + views.T @ views / max(1, len(views)))
        tensors = {"mean": mean, "metric": metric / spread[:, None], "manner": first_axis(within) / spread}
        none = {"keys": torch.zeros(0, metric.shape[1]), "manners": torch.zeros(0)}
        found = cls(tuple(numbers), tensors | none | {"owners": torch.zeros(0, dtype=torch.long)})
        found.add(described, texts)
        return found

    def emptied(self) -> Memory:
        """The same metric and manner, and nothing remembered."""
        state = self.state_dict()
        return Memory((), state | {name: state[name][:0] for name in ("keys", "manners", "owners")})

    def add(self, described: Float[Tensor, "pictures described"], texts: Sequence[str]) -> None:
        """More pictures, under the metric that is there."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys((*self.texts, *texts)))}
        owners = torch.tensor([numbers[text] for text in texts], device=self.owners.device)
        keys, manners = self.keys_of(described)
        self.keys, self.manners = torch.cat([self.keys, keys]), torch.cat([self.manners, manners])
        self.owners = torch.cat([self.owners, owners.to(self.owners)])
        self.texts = tuple(numbers)

    def keys_of(
        self, described: Float[Tensor, "images described"]
    ) -> tuple[Float[Tensor, "images directions"], Float[Tensor, "images"]]:
        """Unit vectors that are compared by their cosines, and places along the manner."""
        centred = described - self.mean
        return F.normalize(centred @ self.metric, dim=1), centred @ self.manner

    def likeness(self, described: Float[Tensor, "images described"]) -> Float[Tensor, "images pictures"]:
        """Cosines with every picture of the memory, less up to `MANNER` for those in the same manner."""
        keys, manners = self.keys_of(described)
        alike = keys @ self.keys.T
        apart = ((manners[:, None] - self.manners) / APART).square().clamp(max=1)
        return alike - MANNER * (1 - apart) * (alike < VERY)

    def nearest(self, likeness: Float[Tensor, "images pictures"], count: int) -> list[list[str]]:
        """The `count` texts (or all) whose nearest picture is most alike, best first."""
        best = torch.full((len(likeness), len(self.texts)), -torch.inf, device=likeness.device)
        best = best.scatter_reduce(1, self.owners.expand(len(likeness), -1), likeness, "amax")
        ranked = best.topk(min(count, len(self.texts)), dim=1)
        pairs = zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        return [[self.texts[n] for v, n in zip(*row, strict=True) if v > -torch.inf] for row in pairs]

    @torch.no_grad()
    def recall(self, described: Float[Tensor, "images described"], count: int) -> list[list[str]]:
        """Texts of the pictures most like those described, `count` of each, nearest first."""
        return self.nearest(self.likeness(described), count)
