"""The pixel decoder as a diffusers pipeline: progress bar, callbacks, offload, schedulers to swap.

    pipe = PixelsPipeline.of(lv.model.pixels)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(lv.model.decode([codes]), seeds=[0]).images[0]

It gives `Pixels.sample` its parts, and the same pictures. The safety check is the `Pipeline`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from lavit.config import InputError, PixelsConfig, from_json, to_json
from lavit.images import to_image
from lavit.pixels.condition import Head
from lavit.pixels.decoder import Pixels
from lavit.pixels.diffusion import UNet, solver_of


class PixelsPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers is Any
    """Reconstructed features in, pictures out.

    `scheduler` is the solver, `noise` the training's schedule, `pixels` a `PixelsConfig` as JSON.
    """

    model_cpu_offload_seq = "condition->unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' name and form)
    # it is small, and its null condition is a parameter, not a forward that a hook could see
    _exclude_from_cpu_offload = ["condition"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet,
        scheduler: diffusers.SchedulerMixin,
        noise: diffusers.SchedulerMixin,
        condition: Head,
        vae: diffusers.AutoencoderKL | None,
        pixels: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = {"unet": unet, "scheduler": scheduler, "noise": noise, "condition": condition}
        self.register_modules(**parts, vae=vae)
        self.register_to_config(pixels=pixels)

    @classmethod
    def of(cls, pixels: Pixels) -> PixelsPipeline:
        """The pipeline over a decoder's own modules, not copies, with its configured solver."""
        config, noise = pixels.config, pixels.scheduler
        solver = solver_of(config.sampler, noise)
        return cls(pixels.unet, solver, noise, pixels.condition, pixels.vae, to_json(config))

    @property
    def decoder(self) -> Pixels:
        """The decoder made of this pipeline's present parts."""
        config = from_json(PixelsConfig, dict(self.config.pixels))
        return Pixels(config, self.unet, self.noise, self.vae, self.condition)

    @torch.no_grad()
    def __call__(
        self,
        features: Float[Tensor, "images patches dim"],
        *,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | str | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
    ) -> diffusers.ImagePipelineOutput:
        """One picture per row of features; `seeds` defaults to 0, 1, …

        size: (height, width) or an aspect ratio. output_type: "pil", or "pt" (float, 0..1).
        callback_on_step_end is diffusers': called with (pipeline, step, timestep, {"latents":
        latents}), and may return other latents.
        """
        if output_type not in ("pil", "pt"):
            raise InputError(f"output_type is {output_type!r}, expected one of pil, pt")
        decoder, callback = self.decoder, callback_on_step_end
        times = decoder.solver(self.scheduler, num_inference_steps).timesteps
        with self.progress_bar(total=len(times)) as bar:

            def after(step: int, latents: Tensor) -> Tensor | None:
                bar.update()
                given = {"latents": latents}
                return callback(self, step, times[step], given).get("latents") if callback else None

            pictures = decoder.sample(
                features.to(self._execution_device),
                seeds=range(len(features)) if seeds is None else seeds,
                steps=num_inference_steps,
                guidance=guidance_scale,
                sampler=self.scheduler,
                size=size,
                callback=after,
            )
        self.maybe_free_model_hooks()
        if output_type == "pt":
            return diffusers.ImagePipelineOutput(images=pictures / 2 + 0.5)
        return diffusers.ImagePipelineOutput(images=[to_image(picture) for picture in pictures])

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the decoder's folder, as `Pixels.save` does."""
        self.decoder.save(Path(save_directory))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, config: PixelsConfig) -> PixelsPipeline:
        """Read a decoder's folder strictly, as `Pixels.load` does."""
        return cls.of(Pixels.load(Path(folder), config).eval())
