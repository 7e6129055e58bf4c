"""LaVIT as a `DiffusionPipeline` of diffusers, from prompt to picture.

    from lavit.integrations.diffusers import LaVITPipeline
    pipe = LaVITPipeline.from_pretrained("nano")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe("an owl above a red star", generator=torch.Generator().manual_seed(0)).images[0]

The language model writes the picture's codes (`writing_guidance` is Eq. 7's), the pixel decoder
paints them (`guidance_scale`, `num_inference_steps`, the scheduler, the callback, the progress
bar). A generator gives a seed, from which both draw: a picture does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from torch import Tensor

from lavit.config import InputError
from lavit.generate.prompts import drawings_of
from lavit.generate.runner import Runner
from lavit.generate.sampling import Sampling
from lavit.images import to_image
from lavit.model import LaVIT

SEEDS = 2**31  # a generator's seeds are drawn below
OUTPUTS = ("pil", "np", "pt", "latent")
WRITING, PAINTING = ("language", "visual_tokenizer"), ("visual_tokenizer", "pixels")
StepCallback = Callable[["LaVITPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class LaVITPipeline(DiffusionPipeline):  # type: ignore[misc]  # Any
    """A LaVIT (`lavit`) and the solver of its pixel decoder (`scheduler`)."""

    _callback_tensor_inputs = ("latents",)

    def __init__(
        self, lavit: LaVIT, scheduler: SchedulerMixin, *, protocol: str = "default",
        safety: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        lavit.needs("visual_tokenizer", "language", "pixels")
        self.register_modules(lavit=lavit, scheduler=scheduler)
        self.settings: dict[str, Any] = {"protocol": protocol, "safety": safety}
        self.offload_to: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "nano", *, torch_dtype: torch.dtype = torch.float32,
        protocol: str = "default", safety: bool | None = None, **options: Any,
    ) -> LaVITPipeline:  # fmt: skip
        """Open a model: a folder, a shipped name or a name of the hub.

        `options` are those of `LaVIT.from_pretrained`.
        """
        found = LaVIT.from_pretrained(model, dtype=torch_dtype, **options)
        found.needs("visual_tokenizer", "language", "pixels")
        return cls(found, found.pixels.solver(), protocol=protocol, safety=safety)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the model as `LaVIT.save_pretrained` does."""
        self.lavit.save_pretrained(save_directory)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep parts on the CPU but while they work: the language model, then the decoder."""
        where = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
        if gpu_id is not None:
            where = torch.device(where.type, gpu_id)
        self.lavit.to("cpu")
        self.offload_to = where

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not served: refused in one line."""
        raise InputError("layers are not offloaded one by one: use enable_model_cpu_offload")

    @property
    def _execution_device(self) -> torch.device:
        return self.offload_to or self.lavit.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        writing_guidance: float | None = None,
        sampling: Sampling | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw each prompt; what is None is the model's own.

        sampling: how the codes are written. output_type: "pil", "np" `[n, height, width, 3]` and
        "pt" `[n, 3, height, width]` in 0..1, or "latent". callback_on_step_end(pipe, step, time,
        {"latents": …}) is called after each step of the solver; latents that it returns go on.
        """
        if output_type not in OUTPUTS:
            raise InputError(f"output_type is {output_type!r}: use one of {', '.join(OUTPUTS)}")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise InputError(
                "a callback gets latents: callback_on_step_end_tensor_inputs=['latents']"
            )
        if (height is None) != (width is None):
            raise InputError("give height and width, or neither")
        size = None if height is None or width is None else (height, width)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [one for one in prompts for _ in range(num_images_per_prompt)]
        seeds = _seeds(generator, len(prompts))
        runner = Runner(self.lavit, **self.settings)
        with self._working(*WRITING):
            how: dict[str, Any] = {
                "seed": seeds,
                "sampling": sampling,
                "guidance": writing_guidance,
            }
            codes = runner.codes(runner.drawings(drawings_of(prompts), size=size, **how))
        with self._working(*PAINTING):
            found = self._paint(
                codes, seeds, num_inference_steps, guidance_scale, size, callback_on_step_end,
                latents=output_type == "latent",
            )  # fmt: skip
        images = self._shaped(found, output_type, runner, seeds)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _paint(
        self, codes: Sequence[Tensor], seeds: Sequence[int], steps: int | None,
        guidance: float | None, size: tuple[int, int] | None, callback: StepCallback | None, *,
        latents: bool,
    ) -> Tensor:  # fmt: skip
        """Pictures in -1..1, or the last latents."""
        pixels = self.lavit.pixels
        times = pixels.solver(self.scheduler, steps, self.lavit.device).timesteps
        last: list[Tensor] = []
        with self.progress_bar(total=len(times)) as bar:

            def stepped(step: int, now: Tensor) -> Tensor:
                bar.update()
                if callback is not None:
                    changed = callback(self, step, times[step], {"latents": now}) or {}
                    now = changed.get("latents", now)
                last[:] = [now]
                return now

            pictures = pixels.sample(
                self.lavit.decode(codes), seeds=seeds, steps=steps, guidance=guidance,
                sampler=self.scheduler, size=size, callback=stepped,
            )  # fmt: skip
        return last[0] if latents else pictures

    def _shaped(self, found: Tensor, output_type: str, runner: Runner, seeds: Sequence[int]) -> Any:
        """What was painted in the form that is asked for; pictures pass the safety check."""
        if output_type == "latent":
            return found
        images = runner.release([to_image(picture) for picture in found], seeds)
        if output_type == "pil":
            return images
        pictures = (found.float() + 1) / 2
        return pictures if output_type == "pt" else pictures.permute(0, 2, 3, 1).cpu().numpy()

    @contextmanager
    def _working(self, *parts: str) -> Iterator[None]:
        """Parts on the device while they work, where they are offloaded."""
        if self.offload_to is None:
            yield
            return
        modules = [getattr(self.lavit, part) for part in parts]
        for module in modules:
            module.to(self.offload_to)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each picture, drawn from its generator (None: torch's own)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(SEEDS, (count,), generator=generator, device=device)
        return [int(seed) for seed in drawn]
    if len(generator) != count:
        raise InputError(f"{len(generator)} generators for {count} pictures: give one each, or one")
    return [_seeds(own, 1)[0] for own in generator]
