"""VQGAN (Esser et al., arXiv 2012.09841): codes that are made to give pixels back, on a fixed grid.

    picture ─ convolutions ─ grid of rows ─ codebook ─ codes ─ convolutions ─ picture

    loss = L1 + perceptual + λ · generator + 0.25 · commitment,   λ = 0.8 |∇ rec| / (|∇ gen| + 1e-4)

with the gradients at the decoder's last layer, and a patch discriminator under a hinge loss, which
begins when a half of the training is over. From the paper: all of that, and that the LM writes
every code of the grid. Different here: three scales and no attention block, group norms in the
discriminator, the codebook is LaVIT's (unit vectors, averages in place of gradients, k-means at
the start of phase b: one that learns by gradients dies in minutes), the perceptual distance is in
EfficientNet's early layers in place of LPIPS' VGG, and one AdamW with this project's betas and one
clip of gradients trains generator and discriminator.

The "encoder" before it is none (`VisionConfig.source` "pixels"): a patch is its pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lavit.baselines.selectors import Everything
from lavit.config import InputError, TokenizerConfig, TokenizerTraining
from lavit.pixels.perceptual import Perceptual
from lavit.sequence import VisualTokens
from lavit.train.batches import Randomness, Shard, seeded, to_device
from lavit.train.feeds import FeatureBatch, FeatureFeed
from lavit.train.loop import Metric, Stage
from lavit.visual_tokenizer.codebook import Codebook, Quantised
from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

Paintings = Float[Tensor, "images 3 height width"]
GROUPS = 8
ADVERSARIAL, TINY, LARGEST = 0.8, 1e-4, 1e4  # λ
PERCEPTUAL = 1.0
QUIET = 0.5  # share of the steps before the discriminator counts


class ConvBlock(nn.Sequential):
    """Two convolutions, to be added to what comes in."""

    def __init__(self, width: int) -> None:
        parts = (nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        again = (nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        super().__init__(*parts, *again)

    def forward(self, x: Tensor) -> Tensor:
        """`x` and what is added to it."""
        found = x
        for part in self:
            found = part(found)
        return x + found


def encoder(widths: list[int]) -> nn.Sequential:
    """Pictures to a grid; each width after the first halves the sides, as does the folding."""
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
    for before, width in pairwise(widths):
        layers += [ConvBlock(before), nn.Conv2d(before, width, 3, stride=2, padding=1)]
    return nn.Sequential(
        *layers, ConvBlock(widths[-1]), nn.GroupNorm(GROUPS, widths[-1]), nn.SiLU()
    )


def decoder(widths: list[int], channels: int) -> nn.Sequential:
    """A grid of `channels` to pictures; the mirror of `encoder`."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1), ConvBlock(widths[-1])]
    for before, width in pairwise(widths[::-1]):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1)]
        layers.append(ConvBlock(width))
    last = nn.Conv2d(widths[0], 12, 3, padding=1)
    return nn.Sequential(
        *layers, nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(), last, nn.PixelShuffle(2)
    )


def patch_discriminator(width: int) -> nn.Sequential:
    """pix2pix's: a map of logits, each of a patch of the picture."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for narrow in (width, 2 * width):
        layers.append(nn.Conv2d(narrow, 2 * narrow, 4, stride=2, padding=1))
        layers += [nn.GroupNorm(GROUPS, 2 * narrow), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, padding=1))


def discriminator_loss(true: Tensor, made: Tensor) -> Float[Tensor, ""]:
    """Hinge: mean of max(0, 1 - D(true)) and of max(0, 1 + D(made)), halved."""
    return (F.relu(1 - true).mean() + F.relu(1 + made).mean()) / 2


def generator_loss(made: Tensor) -> Float[Tensor, ""]:
    """-D(made), its mean."""
    return -made.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Float[Tensor, ""]:
    """λ of the header, from both losses and the weight of the decoder's last layer."""
    rec, gen = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    )
    return ADVERSARIAL * (rec / (gen + TINY)).clamp(0, LARGEST).detach()


class VqganStage(Stage):
    """Stage 1: generator and discriminator learn in one step, each from its own loss."""

    name = "tokenizer"
    module: Vqgan
    config: TokenizerTraining

    def __init__(
        self, tokenizer: Vqgan, feed: FeatureFeed, config: TokenizerTraining, *, seed: int
    ) -> None:
        if config.accumulate > 1:
            raise InputError("VQGAN trains on whole steps: set accumulate to 1")
        self.module, self.feed, self.config, self.seed = tokenizer, feed, config, seed
        self.steps = config.steps
        self.prepared = config.steps_a if config.k_means else -1
        self.perceptual = Perceptual()
        self.quantised: tuple[Tensor, Quantised] | None = None

    def batch(self, step: int, shard: Shard) -> FeatureBatch:
        """Pictures of a step."""
        return self.feed.batch(step, shard)

    @torch.no_grad()
    def prepare(self) -> None:
        """Start the codes by k-means on vectors of training pictures."""
        rows: list[Tensor] = []
        while sum(map(len, rows)) < self.config.k_means_vectors:
            found = self.feed.batch(self.steps + len(rows), self.shard).patches
            patches = to_device(found, self.accelerator.device).float()
            rows.append(self.module.vectors(patches).flatten(0, 1))
        generator = seeded(self.seed, Randomness.K_MEANS)
        self.module.codebook.k_means(
            torch.cat(rows), rounds=self.config.k_means, generator=generator
        )

    def losses(self, module: nn.Module, batch: FeatureBatch, step: int) -> dict[str, Metric]:
        """The header's, with the discriminator's own."""
        patches = to_device(batch.patches, self.accelerator.device).float()
        pictures, quantise = self.module.fold(patches), step >= self.config.steps_a
        made, vectors, quantised = module(patches, quantise=quantise)
        l1 = (made - pictures).abs().mean()
        likeness = self.perceptual.to(self.accelerator.device)(made, pictures)
        reconstruction = l1 + PERCEPTUAL * likeness
        loss, figures = reconstruction, {"l1": l1, "perceptual": likeness}
        self.quantised = None
        if quantised is not None:
            self.quantised = vectors.detach(), quantised
            loss = loss + self.config.commitment * quantised.commitment
            figures["commitment"] = quantised.commitment
        if step >= QUIET * self.steps:
            judge = self.module.discriminator
            still = {name: weight.detach() for name, weight in judge.named_parameters()}
            adversarial = generator_loss(functional_call(judge, still, (made,)))
            last = cast("Any", self.module.decoder)[-2].weight
            weight = adaptive_weight(reconstruction, adversarial, last)
            own = discriminator_loss(judge(pictures), judge(made.detach()))
            loss = loss + weight * adversarial + own
            figures |= {"generator": adversarial, "discriminator": own, "weight": weight}
        return {"loss": loss, **figures}

    def after_step(self, step: int) -> dict[str, float]:
        """Move the codes."""
        if self.quantised is None:
            return {}
        vectors, quantised = self.quantised
        self.module.codebook.update(
            vectors,
            quantised.codes,
            decay=self.config.decay,
            patience=self.config.patience,
            generator=seeded(self.seed, Randomness.REVIVAL, step),
        )
        return {"used_codes": float(len(quantised.codes.unique()))}

    def state(self) -> dict[str, Tensor]:
        """The place of the feed."""
        return self.feed.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        self.feed.load_state(state)


class Vqgan(VisualTokenizer):
    """A tokenizer whose features are pixels, and whose every patch is a code (keep="all")."""

    stage = VqganStage

    def __init__(self, config: TokenizerConfig, *, width: int = 32) -> None:
        super().__init__(config)
        self.grid = round(config.patches**0.5)
        self.patch = round((config.dim / 3) ** 0.5)
        if 3 * self.patch**2 != config.dim or self.patch < 2 or self.patch & (self.patch - 1):
            said = f"VQGAN takes pixels of square patches, of 2, 4, 8 … a side, not {config.dim}"
            raise InputError(f'{said} channels: set vision.source to "pixels"')
        widths = [width * min(4, 2**n) for n in range(round(math.log2(self.patch)))]
        self.encoder, self.decoder = encoder(widths), decoder(widths, config.code_dim)
        self.discriminator = patch_discriminator(width)
        self.codebook = Codebook(widths[-1], config.codes, config.code_dim)
        self.selector: Any = Everything()
        self.reconstructor: Any = nn.Identity()

    def fold(self, patches: Patches) -> Paintings:
        """Pictures of patches of pixels; inverse of `unfold`."""
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (self.grid, -1)), self.patch)

    def unfold(self, pictures: Paintings) -> Patches:
        """Patches of pixels."""
        return F.pixel_unshuffle(pictures, self.patch).flatten(2).transpose(1, 2)

    def vectors(self, patches: Patches) -> Float[Tensor, "images patches code_dim"]:
        """Unit vectors of all places of the grid."""
        return self.codebook.project(self.encoder(self.fold(patches)).flatten(2).transpose(1, 2))

    def painted(self, vectors: Float[Tensor, "images patches code_dim"]) -> Paintings:
        """Pictures of vectors of codes."""
        return self.decoder(vectors.transpose(1, 2).unflatten(2, (self.grid, -1)))

    def forward(  # type: ignore[override]  # its stage alone calls it
        self, patches: Patches, *, quantise: bool
    ) -> tuple[Paintings, Float[Tensor, "total code_dim"], Quantised | None]:
        """Pictures made again, the vectors before the look-up, and the look-up."""
        vectors = self.vectors(patches)
        rows = vectors.flatten(0, 1)
        quantised = self.codebook.quantise(rows) if quantise else None
        found = vectors if quantised is None else quantised.vectors.view_as(vectors)
        return self.painted(found), rows, quantised

    @torch.no_grad()
    def encode(self, patches: Patches, *_: Any, **how: Any) -> VisualTokens:
        """All codes of each picture, each encoded alone; there is no other choice."""
        rows = torch.cat([self.vectors(one)[0] for one in patches.split(1)])
        keep: Keep = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        return VisualTokens(self.codebook.index(rows), keep.sum(1), keep)

    def reconstruct(self, patches: Patches, keep: Tensor, *, quantise: bool) -> Tensor:
        """Patches of pixels through the codes."""
        vectors = self.vectors(patches).flatten(0, 1)
        if quantise:
            vectors = self.codebook.vector(self.codebook.index(vectors))
        return self._rebuild(vectors, keep.sum(1), keep)

    def _rebuild(self, vectors: Tensor, lengths: Tensor, keep: Tensor | None) -> Tensor:
        """Patches of pixels of packed vectors."""
        if bool((lengths != self.config.patches).any()):
            said = f"pictures of VQGAN have {self.config.patches} codes, not {lengths.tolist()}"
            raise InputError(f"{said}: set min_tokens and max_tokens to that")
        return self.unfold(self.painted(vectors.unflatten(0, (len(lengths), -1))))
