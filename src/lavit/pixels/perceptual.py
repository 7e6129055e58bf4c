"""A distance between pictures in early layers of EfficientNet-Lite0, for small decoders (stage 3).

Squared error alone makes a decoder that is unsure paint the mean of what might be there: a blur.
Early features of a network that knows pictures tell a blur from an edge (Johnson et al. 2016, arXiv
1603.08155; channels normalised as in LPIPS, arXiv 1801.03924, without its learned weights). Not in
the paper, whose decoder starts from Stable Diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lavit.presets import efficientnet_lite0
from lavit.vision.encoder import load_vision

BLOCKS = (0, 2, 4, 8)  # of EfficientNet-Lite0, after its stem: strides 2, 4, 8 and 16


class Perceptual(nn.Module):
    """Mean over layers and places of the squared distance between unit feature vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = load_vision(efficientnet_lite0(image_size=160))  # it takes any size

    def forward(
        self,
        pictures: Float[Tensor, "images 3 height width"],
        targets: Float[Tensor, "images 3 height width"],
    ) -> Float[Tensor, ""]:
        """Distance of pictures in -1..1 at their own size, with a gradient to `pictures`."""
        with torch.no_grad():
            wanted = self._layers(targets)
        pairs = zip(self._layers(pictures), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _layers(self, pictures: Tensor) -> list[Tensor]:
        moments = self.vision.config.mean, self.vision.config.std
        mean, std = (pictures.new_tensor(value)[:, None, None] for value in moments)
        states = self.vision.early(((pictures + 1) / 2 - mean) / std, BLOCKS)
        return [F.normalize(state, dim=1) for state in states]
