"""Pixels: a diffusion decoder paints the picture of reconstructed features (paper Sec. 3.1, Eq. 5).

    features ─ condition head ─┐
    noise ──────────────────── denoiser (a UNet) × steps ─ latents ─ autoencoder or unfolding

One class; the 512-px (SD 1.5), the 1024-px (SDXL) and our small decoders differ by configuration
alone. Guidance is one batched forward. Noise is drawn per picture from its own seed, so that a
picture does not depend on its batch. The default solver is DPM-Solver++ 2M (arXiv 2211.01095) where
the published decoders take 25-50 DDIM steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from lavit.config import InputError, PixelsConfig, read_json
from lavit.files import load_strictly, load_tensors, save_tensors
from lavit.images import ASPECT_SIZES, MAX_PIXELS, aspect_size
from lavit.pixels.condition import HEADS, Condition, CrossCondition, Head
from lavit.pixels.diffusion import (
    STABLE_DIFFUSION_NOISE,
    Generators,
    UNet,
    check_widths,
    clean_latents,
    level_weights,
    linear_guess,
    noise_schedule,
    null_text,
    random_weights,
    solver_of,
    stored_weights,
)
from lavit.pixels.perceptual import Perceptual
from lavit.visual_tokenizer.layers import Patches

Loss = Float[Tensor, ""]
PictureTensor = Float[Tensor, "images 3 height width"]
Latents = Float[Tensor, "images channels rows columns"]


class Pixels(nn.Module):
    """Condition head, denoiser, noise schedule and, where there is one, autoencoder.

    Pictures are float, -1..1. Latents have unit spread: the autoencoder's, standardised by the mean
    and deviation in its configuration, or pixels folded `patch`² to one (no autoencoder).
    """

    def __init__(
        self,
        config: PixelsConfig,
        unet: UNet,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        if (vae is None) != (not config.vae):
            raise InputError("pixels: an autoencoder goes with a configuration that names one")
        self.config, self.scheduler = config, scheduler
        self.condition: Head = HEADS[config.condition](config)
        self.unet, self.vae = unet, vae
        check_widths(config, unet, self.latent_channels)

    @classmethod
    def build(cls, config: PixelsConfig) -> Pixels:
        """A decoder with the weights of `config.start_from`, or random ones (global generator)."""
        folder = Path(config.start_from) if config.start_from else None
        unet, vae = stored_weights(config, folder) if folder else random_weights(config)
        pixels = cls(config, unet, noise_schedule(config.scheduler or STABLE_DIFFUSION_NOISE), vae)
        if folder and config.unconditional == "text":
            assert isinstance(pixels.condition, CrossCondition)
            pixels.condition.take_null(null_text(folder))
        return pixels

    def recompute(self, on: bool) -> None:
        """Drop activations of denoiser and autoencoder in training and compute them again."""
        for part in (self.unet, self.vae):
            if part is not None and on:
                part.enable_gradient_checkpointing()
            elif part is not None:
                part.disable_gradient_checkpointing()

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

        Ratios have the sizes of the 1024-px decoder (`images.ASPECT_SIZES`), scaled to our own.
        """
        own, multiple = self.config.size, self.multiple
        if size is None:
            return own, own
        if not isinstance(size, str):
            return size
        whole = ASPECT_SIZES["1:1"][0]
        height, width = (max(1, round(side * own / whole / multiple)) for side in aspect_size(size))
        return height * multiple, width * multiple

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `InputError` unless the decoder can paint (height, width) pixels."""
        if any(side < 1 or side % self.multiple for side in size):
            given = f"{size[0]}x{size[1]}"
            raise InputError(f"pixels: size is {given}, expected multiples of {self.multiple}")
        if size[0] * size[1] > MAX_PIXELS:
            given = f"{size[0]}x{size[1]}"
            raise InputError(f"pixels: size is {given}, expected at most {MAX_PIXELS} pixels")

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        if not isinstance(self.unet, UNet2DModel):
            return self.factor
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pictures: PictureTensor) -> Latents:
        """Latents of pictures in -1..1, the autoencoder's most likely ones. Inverse of `decode`."""
        if self.vae is None:
            return F.pixel_unshuffle(pictures, self.config.patch)
        vae = self._steady_vae()
        each = pictures.to(vae.dtype).split(1)  # one by one, as they are decoded
        latents = torch.cat([vae.encode(one).latent_dist.mode() for one in each])
        mean, deviation = self._latent_moments(latents)
        return ((latents - mean) / deviation).to(pictures.dtype)

    def decode(self, latents: Latents) -> PictureTensor:
        """Pictures of latents, not clamped."""
        if self.vae is None:
            return F.pixel_shuffle(latents, self.config.patch)
        vae = self._steady_vae()
        mean, deviation = self._latent_moments(latents)
        return vae.decode((latents * deviation + mean).to(vae.dtype)).sample.to(latents.dtype)

    def forward(
        self,
        latents: Latents,
        features: Patches,
        *,
        generator: Generators,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 0.0,
    ) -> Loss:
        """Loss of Eq. 5 on latents (`encode`, computed once): squared error of the predicted noise.

        Each picture gets a noise level and, with probability `condition_dropout`, the null
        condition; from a generator of its own where there are several, whatever the batch.
        """
        images = len(latents)
        drawn = self._draw(latents, generator)
        noise, times, dropped = (part.to(latents.device) for part in drawn)
        size = (latents.shape[2], latents.shape[3])
        condition = self.condition_of(features, size).replaced(
            dropped, self.condition.null(images, size)
        )
        noisy = self.scheduler.add_noise(latents, noise, times)
        target = {"epsilon": noise, "sample": latents}.get(self.scheduler.config.prediction_type)
        if target is None:
            target = self.scheduler.get_velocity(latents, noise, times)
        found = self._predict(noisy, times, condition)
        errors = (found.float() - target.float()).square().flatten(1).mean(1)
        loss = (errors * level_weights(self.scheduler, times, self.config.weighting)).mean()
        if perceptual is None:
            return loss
        clean = clean_latents(self.scheduler, noisy, found, times)
        return loss + perceptual_weight * perceptual(self.decode(clean), self.decode(latents))

    def _draw(self, latents: Tensor, generator: Generators) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, noise levels, and which pictures lose their condition."""
        if not isinstance(generator, torch.Generator):
            pairs = zip(latents.split(1), generator, strict=True)
            drawn = zip(*(self._draw(one, own) for one, own in pairs), strict=True)
            noise, times, dropped = (torch.cat(part) for part in drawn)
            return noise, times, dropped
        images, levels = len(latents), self.scheduler.config.num_train_timesteps
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        noise = torch.randn(latents.shape, **where).to(latents)
        times = torch.randint(levels, (images,), **where)
        return noise, times, torch.rand(images, **where) < self.config.condition_dropout

    def sample(self, features: Patches, **how: Any) -> PictureTensor:
        """Paint one picture per row of features, -1..1; `how` is that of `denoise`."""
        for latents in self.denoise(features, **how):
            last = latents
        return self.pictures(last)

    @torch.no_grad()
    def denoise(
        self,
        features: Patches,
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | SchedulerMixin | None = None,
        size: tuple[int, int] | str | None = None,
    ) -> Generator[Latents, Latents | None]:
        """The latents after each step of the solver; what is None comes from the configuration.

        seeds: one per picture, its noise whatever the batch. sampler: "dpm", "ddim" or any
        diffusers scheduler. size: (height, width) in pixels, or an aspect ratio (`picture_size`).
        Latents that are sent back take the place of those after the step.
        """
        guidance = self.config.guidance if guidance is None else guidance
        if not guidance >= 0:
            raise InputError(f"pixels: guidance is {guidance}, expected 0 or more (1 is without)")
        if len(seeds) != len(features):
            pictures = f"{len(features)} pictures"
            raise InputError(f"pixels: {len(seeds)} seeds for {pictures}, expected one each")
        height, width = self.picture_size(size)
        self.check_size((height, width))
        solver = self.solver(sampler, steps, features.device)
        shape = (self.latent_channels, height // self.factor, width // self.factor)
        weight = self.unet.dtype
        condition = self.condition_of(features.to(weight), shape[1:])
        if guidance != 1:
            condition = condition.followed_by(self.condition.null(len(features), shape[1:]))
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = latents.to(features.device) * solver.init_noise_sigma
        random = "generator" in inspect.signature(solver.step).parameters
        extra = {"generator": generators} if random else {}
        for time in solver.timesteps:
            scaled = solver.scale_model_input(latents, time).to(weight)
            found = self._guided(scaled, time, condition, guidance).float()
            latents = solver.step(found, time, latents, **extra).prev_sample
            changed = yield latents
            latents = latents if changed is None else changed

    @torch.no_grad()
    def pictures(self, latents: Latents) -> PictureTensor:
        """Pictures of clean latents, -1..1."""
        # one by one: SDXL's autoencoder takes GBs a picture
        each = latents.to(self.unet.dtype).split(1)
        return torch.cat([self.decode(one) for one in each]).clamp(-1, 1)

    def solver(
        self,
        sampler: str | SchedulerMixin | None = None,
        steps: int | None = None,
        device: torch.device | None = None,
    ) -> SchedulerMixin:
        """A solver for one call, its noise levels set; None is the configuration's."""
        steps = self.config.steps if steps is None else steps
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise InputError(f"pixels: steps is {steps}, expected 1 to {most}")
        solver = solver_of(sampler or self.config.sampler, self.scheduler)
        solver.set_timesteps(steps, device=device)
        return solver

    def condition_of(self, features: Patches, size: tuple[int, int]) -> Condition:
        """The condition that features make, for latents of `size` (height, width)."""
        patches, dim = self.config.patches, self.config.features_dim
        if features.dim() != 3 or features.shape[1:] != (patches, dim):
            expected = f"[pictures, {patches}, {dim}]"
            raise InputError(f"pixels: features are {list(features.shape)}, expected {expected}")
        if self.config.direction:
            features = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
        return self.condition(features, size)

    def save(self, folder: Path) -> None:
        """Write unet/, scheduler/, vae/ as diffusers does, and condition/model.safetensors."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        save_tensors(self.condition.state_dict(), folder / "condition" / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, config: PixelsConfig) -> Pixels:
        """Inverse of `save`; a part that is missing or of other sizes raises `InputError`."""
        where = folder = Path(folder)
        try:
            unet, vae = stored_weights(config, folder)
            where = folder / "scheduler" / "scheduler_config.json"
            found = read_json(where)
            for name, value in config.scheduler.items():
                if found.get(name) != value:
                    raise InputError(f"{name} is {found.get(name)!r}, config.json says {value!r}")
            scheduler, where = noise_schedule(found), folder
            pixels = cls(config, unet, scheduler, vae)
        except InputError as error:
            said = str(error)
            raise error if str(folder) in said else InputError(f"{where}: {said}") from error
        except Exception as error:  # broken configurations: diffusers fails in many ways
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{where} cannot be read for this configuration: {reason}") from error
        where = folder / "condition" / "model.safetensors"
        load_strictly(pixels.condition, load_tensors(where), where)
        return pixels

    def _guided(
        self, latents: Tensor, time: Tensor, condition: Condition, guidance: float
    ) -> Tensor:
        if guidance == 1:
            return self._predict(latents, time, condition)
        with_features, without = self._predict(latents.repeat(2, 1, 1, 1), time, condition).chunk(2)
        return without + guidance * (with_features - without)

    def _predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output; `times` is one noise level or one per picture."""
        if self.config.sees == "estimate":
            latents = linear_guess(self.scheduler, latents, times)
        if condition.grid is not None:
            latents = torch.cat([latents, condition.grid.to(latents.dtype)], dim=1)
        if condition.context is None:
            return self.unet(latents, times).sample
        extra: dict[str, Any] = {"encoder_attention_mask": condition.valid}
        if condition.pooled is not None:
            height, width = (side * self.factor for side in latents.shape[2:])
            ids = latents.new_tensor([height, width, 0, 0, height, width]).expand(len(latents), -1)
            extra["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": ids}
        return self.unet(latents, times, condition.context, **extra).sample

    def _steady_vae(self) -> AutoencoderKL:
        """The autoencoder, in fp32 where it would overflow in fp16 (SDXL's `force_upcast`)."""
        vae: AutoencoderKL = self.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        return vae

    def _latent_moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, [channels, 1, 1]."""
        vae: AutoencoderKL = self.vae
        config = vae.config
        mean, deviation = config.latents_mean, config.latents_std
        mean = [config.shift_factor or 0.0] if mean is None else mean
        deviation = [1.0] if deviation is None else deviation
        mean, deviation = (like.new_tensor(v, dtype=torch.float32) for v in (mean, deviation))
        return mean[:, None, None], deviation[:, None, None] / config.scaling_factor
