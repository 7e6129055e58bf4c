"""Stage 3: ε-prediction on reconstructed features (paper Eq. 5); an autoencoder stays frozen.

Noise is a function of (seed, step, place in the global batch): one rank and two see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lavit.config import PixelsTraining
from lavit.pixels.decoder import Pixels
from lavit.pixels.perceptual import Perceptual
from lavit.train.batches import Randomness, Shard, seeded, to_device
from lavit.train.feeds import PixelBatch, PixelFeed
from lavit.train.loop import Metric, Stage
from lavit.train.muon import matrices_apart
from lavit.visual_tokenizer.tokenizer import VisualTokenizer


class PixelsStage(Stage):
    """Stage 3: the denoiser, on features reconstructed from the codes of each picture."""

    name = "pixels"
    module: Pixels
    config: PixelsTraining

    def __init__(
        self,
        pixels: Pixels,
        tokenizer: VisualTokenizer,
        feed: PixelFeed,
        config: PixelsTraining,
        *,
        seed: int,
    ) -> None:
        device = next(pixels.parameters()).device
        self.perceptual = Perceptual().to(device) if config.perceptual_weight else None
        self.module, self.feed, self.config, self.seed = pixels, feed, config, seed
        self.steps, self.accumulate = config.steps, config.accumulate
        self.tokenizer = tokenizer.eval()
        if pixels.vae is not None:
            pixels.vae.requires_grad_(False)
        pixels.recompute(config.recompute)
        self.averaged = {name: p.detach().clone() for name, p in self._trained()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, or kernels and matrices apart."""
        groups = super().parameter_groups()
        if self.config.optimizer == "adamw":
            return groups
        return matrices_apart(groups, self.module)

    def batch(self, step: int, shard: Shard) -> PixelBatch:
        """Pictures of a step."""
        return self.feed.batch(step, shard)

    def losses(self, module: nn.Module, batch: PixelBatch, step: int) -> dict[str, Metric]:
        """Mean squared error of the predicted noise."""
        device, places = self.accelerator.device, batch.places.tolist()
        drawn = zip(places, batch.codes, strict=True)
        codes = [self._erring(place, own, batch.others, step) for place, own in drawn]
        with torch.no_grad():
            lengths = torch.tensor([len(c) for c in codes])
            given = to_device(torch.cat(codes), device), to_device(lengths, device)
            features = self.tokenizer.decode(*given)
            latents = self.module.encode(to_device(batch.pictures, device))
        kind = Randomness.DIFFUSION
        loss = module(
            latents,
            features,
            generator=[seeded(self.seed, kind, step, place) for place in places],
            perceptual=self.perceptual,
            perceptual_weight=self.config.perceptual_weight,
        )
        return {"loss": loss / self.accumulate}

    def _erring(
        self, place: int, codes: Int[Tensor, "kept"], others: Sequence[Tensor], step: int
    ) -> Int[Tensor, "kept"]:
        """Codes of a picture, a random share of them from another one, as a LM errs."""
        if not self.config.code_noise:
            return codes
        generator = seeded(self.seed, Randomness.CODE_NOISE, step, place)
        other = others[int(torch.randint(len(others), (), generator=generator))]
        drawn = other[torch.randint(len(other), codes.shape, generator=generator)]
        share = self.config.code_noise * torch.rand((), generator=generator)
        return torch.where(torch.rand(codes.shape, generator=generator) < share, drawn, codes)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Move the averaged weights.

        Their memory is short at first, as in TensorFlow's average: at a decay of 0.998 the first
        weights would else be 5 % of them after 1,500 steps, and 22 % after 750.
        """
        share = 1 - min(self.config.ema, (1 + step) / (10 + step))
        for name, parameter in self._trained():
            self.averaged[name].lerp_(parameter, share)
        return {}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = self.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """The averaged weights, and the place of the feed."""
        return {**self.averaged, **self.feed.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take both back."""
        for name, mean in self.averaged.items():
            mean.copy_(state[name])
        own = self.averaged.keys()
        self.feed.load_state({name: state[name] for name in state.keys() - own})
