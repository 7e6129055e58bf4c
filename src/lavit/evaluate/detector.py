"""The judge's eye: a small network that finds things in a picture.

It follows CenterNet (Zhou et al., https://arxiv.org/abs/1904.07850): each cell of a coarse grid
says whether a thing is centred there, and if so what it is and how far it reaches. Where we differ:
the cells next to a centre learn the same answer, "unknown" is a name like the others, and every
cell also votes for the background. It is trained on renders alone (recipes/judge.py) and shares
nothing with the model that it judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import fusion

SIDE = 96  # pixels of a picture that goes in
STRIDE = 8
CELLS = SIDE // STRIDE
WIDTHS = (48, 96)  # channels at strides 4 and 8
BLOCKS = 1
HEAD = 160


@dataclass(frozen=True)
class Maps:
    """What every cell says, as logits; `place` is (right, down, log of the side).

    Right and down count cells from the cell's middle; the side is a share of the width.
    """

    heat: Float[Tensor, "pictures rows columns"]
    name: Float[Tensor, "pictures names rows columns"]
    colour: Float[Tensor, "pictures colours rows columns"]
    style: Float[Tensor, "pictures styles rows columns"]
    place: Float[Tensor, "pictures 3 rows columns"]
    ground: Float[Tensor, "pictures grounds"]
    pattern: Float[Tensor, "pictures patterns"]


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.first = conv(width, width, 3, norm=norm)
        self.second = conv(width, width, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as it came."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Detector(nn.Module):
    """Pictures to maps. `sizes` counts names, colours, styles, background colours, patterns.

    With `norm` it is what is trained; without, what is shipped (see `fused`).
    """

    def __init__(self, sizes: tuple[int, int, int, int, int], *, norm: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        names, colours, styles, grounds, patterns = sizes
        stem, coarse = WIDTHS
        self.stem = conv(3, stem, 8, stride=4, padding=2, norm=norm)
        self.coarse = conv(stem, coarse, 3, stride=2, norm=norm)
        self.blocks = nn.Sequential(*(Residual(coarse, norm=norm) for _ in range(BLOCKS)))
        self.head = conv(coarse, HEAD, 1, norm=norm)
        self.things = nn.Conv2d(HEAD, 1 + names + colours + styles + 3, 1)
        self.vote = nn.Conv2d(coarse, grounds + patterns + 1, 1)
        assert self.things.bias is not None
        nn.init.constant_(self.things.bias[:1], -3.0)

    def forward(self, pictures: Float[Tensor, "pictures 3 height width"]) -> Maps:
        """Maps of pictures whose pixels run from -1 to 1."""
        x = torch.relu(self.stem(pictures))
        x = torch.relu(self.coarse(x))
        x = self.blocks(x)
        names, colours, styles, grounds, patterns = self.sizes
        things = self.things(torch.relu(self.head(x)))
        heat, name, colour, style, place = things.split([1, names, colours, styles, 3], dim=1)
        ground, pattern, weight = self.vote(x).flatten(2).split([grounds, patterns, 1], dim=1)
        share = weight.softmax(dim=-1)
        ground, pattern = ((votes * share).sum(dim=-1) for votes in (ground, pattern))
        return Maps(heat[:, 0], name, colour, style, place, ground, pattern)


def conv(
    wide: int, out: int, kernel: int, *, stride: int = 1, padding: int | None = None, norm: bool,
) -> nn.Module:  # fmt: skip
    """A convolution, with batch normalisation while it is trained."""
    padding = kernel // 2 if padding is None else padding
    layer = nn.Conv2d(wide, out, kernel, stride, padding, bias=not norm)
    return nn.Sequential(layer, nn.BatchNorm2d(out)) if norm else layer


def fused(trained: Detector) -> Detector:
    """The same function without normalisation: it is worked into the convolutions."""
    shipped = Detector(trained.sizes)
    trained.eval()
    state: dict[str, Tensor] = {}
    for name, part in trained.named_modules():
        if not isinstance(part, nn.Sequential):
            continue
        convolution, norm = part[0], part[-1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            one = fusion.fuse_conv_bn_eval(convolution, norm)
            state |= {f"{name}.{key}": value for key, value in one.state_dict().items()}
    for name in ("things", "vote"):
        part = getattr(trained, name)
        state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    shipped.load_state_dict(state)
    return shipped.eval()


@dataclass(frozen=True)
class Found:
    """One thing as the network says it: indices of name, colour and style; -1 is unknown."""

    name: int
    colour: int
    style: int
    x: float
    y: float
    side: float
    heat: float
    sure: float  # probability of the name


@torch.inference_mode()
def find(maps: Maps, *, heat: float) -> list[list[Found]]:
    """Things of each picture: the cells that are hotter than their neighbours and than `heat`."""
    hot = maps.heat.sigmoid()
    peak = nn.functional.max_pool2d(hot[:, None], 3, 1, 1)[:, 0]
    found: list[list[Found]] = [[] for _ in range(len(hot))]
    names = maps.name.softmax(dim=1)
    for picture, row, column in ((hot == peak) & (hot >= heat)).nonzero().tolist():
        at = (picture, slice(None), row, column)
        sure, name = names[at].max(dim=0)
        right, down, side = maps.place[at].tolist()
        found[picture].append(
            Found(
                int(name),
                int(maps.colour[at].argmax()),
                int(maps.style[at].argmax()),
                (column + 0.5 + right) / CELLS,
                (row + 0.5 + down) / CELLS,
                min(1.0, float(torch.tensor(side).exp())),
                float(hot[picture, row, column]),
                float(sure),
            )
        )
    return found
