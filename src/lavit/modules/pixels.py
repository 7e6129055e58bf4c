"""Pixels: a diffusion decoder paints the picture of the reconstructed features (paper Sec. 3.1, Eq. 5).

    features ─ condition head ─┐
    noise ──────────────────── denoiser (diffusers UNet) × steps ─ latents ─ autoencoder, or unfolded pixels ─ picture

One class; the 512-px (SD 1.5), the 1024-px (SDXL) and our small decoders differ by configuration alone. Guidance is one
batched forward. Noise is drawn per picture from its own seed, so that a picture does not depend on its batch.
The default solver is DPM-Solver++ 2M (arXiv 2211.01095) where the published decoders take 25-50 DDIM steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit.config import InputError, PixelsConfig, read_json
from lavit.images import ASPECT_SIZES, aspect_size
from lavit.modules.condition import HEADS, Condition, Head
from lavit.modules.diffusion import (
    STABLE_DIFFUSION_NOISE,
    check_widths,
    clean_latents,
    given_weights,
    level_weights,
    linear_guess,
    load_strictly,
    noise_home,
    noise_schedule,
    normal_noise,
    random_weights,
    solver_of,
    unet_of,
)
from lavit.modules.perceptual import Perceptual

KL_WEIGHT = 1e-6  # as Stable Diffusion's autoencoder
LATENT_VARIANCE = 0.5  # of folded pixels in -1..1


class Pixels(nn.Module):
    """Condition head, denoiser, noise schedule and, where there is one, autoencoder.

    Pictures are float, -1..1. Latents have unit spread: the autoencoder's, standardised by the mean and deviation in its
    configuration, or pixels folded `patch`² to one (no autoencoder).
    """

    def __init__(
        self,
        config: PixelsConfig,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        condition: Head | None = None,
    ) -> None:
        super().__init__()
        if (vae is None) != (not config.vae):
            raise InputError("pixels: an autoencoder is needed exactly where the configuration names one")
        self.config, self.scheduler = config, scheduler
        self.condition = HEADS[config.condition](config) if condition is None else condition
        self.unet, self.vae = unet, vae
        check_widths(config, unet, scheduler, self.latent_channels)

    @classmethod
    def build(cls, config: PixelsConfig) -> Pixels:
        """A decoder with the weights of `config.start_from`, or random ones (of the global generator)."""
        unet, vae, null = given_weights(config) if config.start_from else random_weights(config)
        pixels = cls(config, unet, noise_schedule(config.scheduler or STABLE_DIFFUSION_NOISE), vae)
        if null is not None:
            pixels.condition.take_null(null)
        return pixels

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        if self.vae is None:
            return self.config.patch
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return 3 * self.config.patch**2 if self.vae is None else self.vae.config.latent_channels

    def picture_size(self, size: tuple[int, int] | str | None = None) -> tuple[int, int]:
        """(height, width) in pixels of a pair, of an aspect ratio such as "4:3", or the default.

        Ratios have the sizes of the 1024-px decoder (`images.ASPECT_SIZES`), scaled to this decoder's own size.
        """
        own = self.config.size
        if size is None:
            return own, own
        if not isinstance(size, str):
            return size
        whole = ASPECT_SIZES["1:1"][0]
        height, width = (max(1, round(side * own / whole / self.multiple)) for side in aspect_size(size))
        return height * self.multiple, width * self.multiple

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `InputError` unless the decoder can paint (height, width) pixels."""
        if any(side < 1 or side % self.multiple for side in size):
            raise InputError(f"pixels: size is {size[0]}x{size[1]}, expected multiples of {self.multiple}")

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        levels = 2 ** (len(self.unet.config.block_out_channels) - 1) if isinstance(self.unet, UNet2DModel) else 1
        return self.factor * levels

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images channels rows columns"]:
        """Latents of pictures in -1..1; the most likely ones where there is an autoencoder. Inverse of `decode`."""
        if self.vae is None:
            return F.pixel_unshuffle(pictures, self.config.patch)
        vae = self._steady_vae()
        latents = vae.encode(pictures.to(vae.dtype)).latent_dist.mode()
        mean, deviation = self._latent_moments(latents)
        return ((latents - mean) / deviation).to(pictures.dtype)

    def decode(self, latents: Float[Tensor, "images channels rows columns"]) -> Float[Tensor, "images 3 height width"]:
        """Pictures of latents, not clamped."""
        if self.vae is None:
            return F.pixel_shuffle(latents, self.config.patch)
        vae = self._steady_vae()
        mean, deviation = self._latent_moments(latents)
        return vae.decode((latents * deviation + mean).to(vae.dtype)).sample.to(latents.dtype)

    def autoencoder_loss(
        self,
        pictures: Float[Tensor, "images 3 height width"],
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Float[Tensor, ""]:
        """L1 of the reconstruction and a trace of KL to the unit normal: trains `vae` before stage 3."""
        if self.vae is None:
            raise InputError("pixels: this decoder has no autoencoder to train (its latents are folded pixels)")
        posterior = self.vae.encode(pictures).latent_dist
        noise = normal_noise(posterior.mean, generator)
        latents = posterior.mean + posterior.std * noise.to(pictures)
        return F.l1_loss(self.vae.decode(latents).sample, pictures) + KL_WEIGHT * posterior.kl().mean()

    @torch.no_grad()
    def calibrate(self, pictures: Float[Tensor, "images 3 height width"]) -> None:
        """Measure mean and deviation of the autoencoder's latents, per channel, so that `encode` standardises them."""
        if self.vae is None:
            raise InputError("pixels: folded pixels need no calibration")
        parts = [self.vae.encode(part).latent_dist.mode() for part in pictures.split(64)]
        deviation, mean = torch.std_mean(torch.cat(parts), dim=(0, 2, 3))
        self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist(), scaling_factor=1.0)

    def forward(
        self,
        latents: Float[Tensor, "images channels rows columns"],
        features: Float[Tensor, "images patches dim"],
        *,
        generator: torch.Generator | Sequence[torch.Generator],
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Loss of Eq. 5 on latents (`encode`, computed once): squared error of the predicted noise.

        Each picture gets a noise level and, with probability `condition_dropout`, the null condition; from a generator of
        its own where there are several, whatever the batch.
        """
        self._check_features(features)
        images = len(latents)
        noise, times, dropped = (drawn.to(latents.device) for drawn in self._draw(latents, generator))
        size = tuple(latents.shape[2:])
        condition = self.told(features, size).replaced(dropped, self.condition.null(images, size))
        noisy = self.scheduler.add_noise(latents, noise, times)
        kind = self.scheduler.config.prediction_type
        target = {"epsilon": noise, "sample": latents}.get(kind)
        if target is None:
            target = self.scheduler.get_velocity(latents, noise, times)
        found = self._predict(noisy, times, condition)
        errors = (found.float() - target.float()).square().flatten(1).mean(1)
        loss = (errors * level_weights(self.scheduler, times, self.config.weighting)).mean()
        if perceptual is None:
            return loss
        clean = clean_latents(self.scheduler, noisy, found, times)
        return loss + perceptual_weight * perceptual(self.decode(clean), self.decode(latents))

    def _draw(
        self, latents: Tensor, generator: torch.Generator | Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, noise levels, and which pictures lose their condition."""
        if not isinstance(generator, torch.Generator):
            drawn = [self._draw(one[None], own) for one, own in zip(latents, generator, strict=True)]
            return tuple(torch.cat(part) for part in zip(*drawn, strict=True))
        images, options = len(latents), {"generator": generator, "device": noise_home(generator, latents)}
        noise = normal_noise(latents, generator).to(latents)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (images,), **options)
        return noise, times, torch.rand(images, **options) < self.config.condition_dropout

    @torch.no_grad()
    def sample(
        self,
        features: Float[Tensor, "images patches dim"],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | SchedulerMixin | None = None,
        size: tuple[int, int] | str | None = None,
        callback: Callable[[int, Tensor], Tensor | None] | None = None,
    ) -> Float[Tensor, "images 3 height width"]:
        """Paint one picture per row of features, -1..1; what is None comes from the configuration.

        seeds: one per picture, its noise whatever the batch. sampler: "dpm", "ddim" or any diffusers scheduler.
        size: (height, width) in pixels, or an aspect ratio (`picture_size`). callback: called with the step's number and
        the latents after each step; what it returns, if anything, takes their place.
        """
        guidance = self.config.guidance if guidance is None else guidance
        height, width = self.picture_size(size)
        self._check_request(features, seeds, guidance, (height, width))
        solver = self.solver(sampler, steps, features.device)
        shape = (self.latent_channels, height // self.factor, width // self.factor)
        weight = self.unet.dtype
        condition = self.told(features.to(weight), shape[1:])
        if guidance != 1:
            condition = condition.followed_by(self.condition.null(len(features), shape[1:]))
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = latents.to(features.device) * solver.init_noise_sigma
        extra = {"generator": generators} if "generator" in inspect.signature(solver.step).parameters else {}
        for step, time in enumerate(solver.timesteps):
            scaled = solver.scale_model_input(latents, time).to(weight)
            found = self._guided(scaled, time, condition, guidance, (height, width)).float()
            latents = solver.step(found, time, latents, **extra).prev_sample
            if callback is not None:
                changed = callback(step, latents)
                latents = latents if changed is None else changed
        return self.decode(latents.to(weight)).clamp(-1, 1)

    def solver(
        self, sampler: str | SchedulerMixin | None = None, steps: int | None = None, device: torch.device | None = None
    ) -> SchedulerMixin:
        """A solver of its own for one call, its noise levels set; what is None comes from the configuration."""
        steps = self.config.steps if steps is None else steps
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise InputError(f"pixels: steps is {steps}, expected 1 to {most}")
        solver = solver_of(sampler or self.config.sampler, self.scheduler)
        solver.set_timesteps(steps, device=device)
        return solver

    def told(self, features: Float[Tensor, "images patches dim"], size: tuple[int, int]) -> Condition:
        """The condition that features make, for latents of `size` (height, width)."""
        self._check_features(features)
        if self.config.direction:
            features = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
        return self.condition(features, size)

    def save(self, folder: Path) -> None:
        """Write unet/, scheduler/, vae/ (each opens in diffusers) and condition/model.safetensors."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        (folder / "condition").mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.condition.state_dict().items()}
        save_file(tensors, folder / "condition" / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, config: PixelsConfig) -> Pixels:
        """Read what `save` wrote; a part that is missing or of other sizes than `config`'s raises `InputError`."""
        folder = Path(folder)
        unet_class = unet_of(read_json(folder / "unet" / "config.json").get("_class_name"))
        unet = load_strictly(unet_class, folder / "unet", config.unet)
        vae = load_strictly(AutoencoderKL, folder / "vae", config.vae) if config.vae else None
        scheduler = noise_schedule(read_json(folder / "scheduler" / "scheduler_config.json"))
        pixels = cls(config, unet, scheduler, vae)
        where = folder / "condition" / "model.safetensors"
        try:
            pixels.condition.load_state_dict(load_file(where))
        except FileNotFoundError as error:
            raise InputError(f"{where} is missing: this model folder is incomplete") from error
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{where} does not fit this configuration: {reason}") from error
        return pixels

    def _guided(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        guidance: float,
        size: tuple[int, int],
    ) -> Tensor:
        if guidance == 1:
            return self._predict(latents, time, condition, size)
        with_features, without = self._predict(latents.repeat(2, 1, 1, 1), time, condition, size).chunk(2)
        return without + guidance * (with_features - without)

    def _predict(
        self,
        latents: Tensor,
        times: Tensor,
        condition: Condition,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """The denoiser's output; `times` is one noise level or one per picture, `size` the picture's, for SDXL's ids."""
        if self.config.sees == "estimate":
            latents = linear_guess(self.scheduler, latents, times, variance=LATENT_VARIANCE)
        if condition.grid is not None:
            latents = torch.cat([latents, condition.grid.to(latents.dtype)], dim=1)
        if condition.context is None:
            return self.unet(latents, times).sample
        extra: dict[str, Any] = {"encoder_attention_mask": condition.valid}
        if condition.pooled is not None:
            height, width = size or tuple(side * self.factor for side in latents.shape[2:])
            ids = latents.new_tensor([height, width, 0, 0, height, width]).expand(len(latents), -1)
            extra["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": ids}
        return self.unet(latents, times, condition.context, **extra).sample

    def _steady_vae(self) -> AutoencoderKL:
        """The autoencoder, in fp32 where it would overflow in fp16 (SDXL's `force_upcast`)."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)
        return self.vae

    def _latent_moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, [channels, 1, 1], from its configuration."""
        config = self.vae.config
        mean = config.latents_mean if config.latents_mean is not None else [config.shift_factor or 0.0]
        deviation = config.latents_std if config.latents_std is not None else [1.0]
        mean, deviation = (torch.tensor(v, device=like.device)[:, None, None] for v in (mean, deviation))
        return mean, deviation / config.scaling_factor

    def _check_features(self, features: Shaped[Tensor, "..."]) -> None:
        expected = (self.config.patches, self.config.features_dim)
        if features.dim() != 3 or tuple(features.shape[1:]) != expected:
            raise InputError(
                f"pixels: features are {list(features.shape)}, expected [pictures, {expected[0]}, {expected[1]}]"
            )

    def _check_request(
        self,
        features: Tensor,
        seeds: Sequence[int],
        guidance: float,
        size: tuple[int, int],
    ) -> None:
        self._check_features(features)
        if not guidance >= 0:
            raise InputError(f"pixels: guidance is {guidance}, expected 0 or more (1 is without guidance)")
        if len(seeds) != len(features):
            raise InputError(f"pixels: {len(seeds)} seeds for {len(features)} pictures, expected one each")
        self.check_size(size)
