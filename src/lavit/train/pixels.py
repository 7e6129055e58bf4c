"""Stage 3: ε-prediction on reconstructed features (paper Eq. 5); an autoencoder stays frozen.

Noise is a function of (seed, step, place in the global batch): one rank and two see the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lavit.config import PixelsTraining
from lavit.data.features import Pictures
from lavit.pixels.decoder import Pixels
from lavit.pixels.perceptual import Perceptual
from lavit.sequence import VisualTokens
from lavit.train.batches import PictureBatch, Randomness, Shard, draw_batch, seeded
from lavit.train.loop import Metric, Stage
from lavit.train.muon import matrices_apart
from lavit.vision.encoder import Vision
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
        pictures: Pictures,
        tokens: VisualTokens,
        config: PixelsTraining,
        *,
        seed: int,
        vision: Vision | None = None,
    ) -> None:
        """`pictures` and `tokens` are in one order; `vision` is for the loss's perceptual part."""
        self.perceptual = None if vision is None else Perceptual(vision)
        self.module, self.config, self.seed = pixels, config, seed
        self.steps = config.steps
        self.tokenizer, self.codes = tokenizer.eval(), tokens.split()
        self.pictures = pictures
        if pixels.vae is not None:
            pixels.vae.requires_grad_(False)
        average = get_ema_multi_avg_fn(config.ema)
        self.averaged = AveragedModel(pixels, multi_avg_fn=average, use_buffers=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, or kernels and matrices apart."""
        groups = super().parameter_groups()
        if self.config.optimizer == "adamw":
            return groups
        return matrices_apart(groups, self.module)

    def batch(self, step: int, shard: Shard) -> PictureBatch:
        """Pictures of a step."""
        return draw_batch(len(self.pictures), self.config.batch, shard, seed=self.seed, step=step)

    def losses(self, module: nn.Module, batch: PictureBatch, step: int) -> dict[str, Metric]:
        """Mean squared error of the predicted noise."""
        device = self.accelerator.device
        drawn = zip(batch.places.tolist(), batch.pictures.tolist(), strict=True)
        codes = [self._erring(place, picture, step).to(device) for place, picture in drawn]
        with torch.no_grad():
            lengths = torch.tensor([len(c) for c in codes], device=device)
            features = self.tokenizer.decode(torch.cat(codes), lengths)
            latents = self.module.encode(self.pictures.rows(batch.pictures).to(device))
        places, kind = batch.places.tolist(), Randomness.DIFFUSION
        loss = module(
            latents,
            features,
            generator=[seeded(self.seed, kind, step, place) for place in places],
            perceptual=self.perceptual,
            perceptual_weight=self.config.perceptual_weight,
        )
        return {"loss": loss}

    def _erring(self, place: int, picture: int, step: int) -> Int[Tensor, "kept"]:
        """Codes of a picture, a random share of them from another one, as a LM errs."""
        codes = self.codes[picture]
        if not self.config.code_noise:
            return codes
        generator = seeded(self.seed, Randomness.CODE_NOISE, step, place)
        other = self.codes[int(torch.randint(len(self.codes), (), generator=generator))]
        drawn = other[torch.randint(len(other), codes.shape, generator=generator)]
        share = self.config.code_noise * torch.rand((), generator=generator)
        return torch.where(torch.rand(codes.shape, generator=generator) < share, drawn, codes)

    def after_step(self, step: int) -> dict[str, float]:
        """Move the averaged weights."""
        self.averaged.update_parameters(self.module)
        return {}

    def state(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return dict(self.averaged.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the averaged weights back."""
        self.averaged.load_state_dict(state)
