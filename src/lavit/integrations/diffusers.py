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

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from torch import Tensor

from lavit.config import InputError, read_json
from lavit.generate.prompts import drawings_of
from lavit.generate.runner import Runner
from lavit.generate.sampling import Sampling
from lavit.images import to_image
from lavit.model import LaVIT
from lavit.pixels.diffusion import DPMSolver, noise_schedule, options

SEEDS = 2**31  # a generator's seeds are drawn below
OUTPUTS = ("pil", "np", "pt", "latent")
WRITING, PAINTING = ("language", "visual_tokenizer"), ("visual_tokenizer", "pixels")
DTYPES = ("float32", "float16", "bfloat16")
# options of diffusers that say what is done anyway
USUAL: Mapping[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": True, "eta": 0}
SCHEDULER = "scheduler/scheduler_config.json"  # of a pipeline, beside the model's folders
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
        self.runner = Runner(lavit, protocol=protocol, safety=safety)
        self.offload_to: torch.device | None = None
        self._interrupt, self._num_timesteps = False, 0
        self._guidance_scale = float(lavit.pixels.config.guidance)

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "nano", *, torch_dtype: torch.dtype | str = torch.float32,
        scheduler: SchedulerMixin | None = None, protocol: str = "default",
        safety: bool | None = None, **more: Any,
    ) -> LaVITPipeline:  # fmt: skip
        """Open a model: a folder, a shipped name or a name of the hub.

        The scheduler is the one given, that of `save_pretrained`, or the model's own. `more` are
        options of `LaVIT.from_pretrained`; `safety_checker=None` is `safety=False`.
        """
        name = str(torch_dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise InputError(f"torch_dtype is {torch_dtype}: use one of {', '.join(DTYPES)}")
        if more.pop("safety_checker", cls) is None:
            safety = False
        known = inspect.signature(LaVIT.from_pretrained).parameters.keys() - {"model", "dtype"}
        _refuse({key: value for key, value in more.items() if key not in known}, "from_pretrained")
        more = {key: value for key, value in more.items() if key in known}
        found = LaVIT.from_pretrained(model, dtype=getattr(torch, name), **more)
        found.needs("visual_tokenizer", "language", "pixels")
        solver = scheduler or _saved(found.folder) or found.pixels.solver()
        return cls(found, solver, protocol=protocol, safety=safety)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the model as `LaVIT.save_pretrained` does, and scheduler/."""
        self.lavit.save_pretrained(save_directory)
        self.scheduler.save_pretrained(Path(save_directory) / Path(SCHEDULER).parent)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the steps of a call."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the solver in the last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """The decoder's guidance in the last call."""
        return self._guidance_scale

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
        prompt: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        writing_guidance: float | None = None,
        sampling: Sampling | None = None,
        **more: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw each prompt, a text or a list of them; what is None is the model's own.

        generator: one, or a list with one for each picture. sampling: how the codes are written.
        output_type: "pil", "np" `[n, height, width, 3]` and "pt" `[n, 3, height, width]` in 0..1,
        or "latent". callback_on_step_end(pipe, step, time, {"latents": …}) is called after each
        step of the solver; latents that it returns go on, and `pipe._interrupt = True` ends the
        steps. Other arguments of diffusers raise `InputError`.
        """
        _refuse(more, "the pipeline")
        if output_type not in OUTPUTS:
            raise InputError(f"output_type is {output_type!r}: use one of {', '.join(OUTPUTS)}")
        tensors = callback_on_step_end_tensor_inputs
        if not isinstance(tensors, list | tuple) or any(one != "latents" for one in tensors):
            raise InputError(
                "a callback gets latents: callback_on_step_end_tensor_inputs=['latents']"
            )
        if (height is None) != (width is None):
            raise InputError("give height and width, or neither")
        size = None if height is None or width is None else (height, width)
        prompts = _texts(prompt)
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt is {num_images_per_prompt!r}: give 1 or more")
        prompts = [one for one in prompts for _ in range(num_images_per_prompt)]
        seeds = _seeds(generator, len(prompts))
        with self._working(*WRITING):
            how: dict[str, Any] = {
                "seed": seeds,
                "sampling": sampling,
                "guidance": writing_guidance,
            }
            codes = self.runner.codes(self.runner.drawings(drawings_of(prompts), size=size, **how))
        with self._working(*PAINTING):
            found = self._paint(
                codes, seeds, num_inference_steps, guidance_scale, size, callback_on_step_end,
                latents=output_type == "latent",
            )  # fmt: skip
        images = self._shaped(found, output_type, seeds)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _paint(
        self, codes: Sequence[Tensor], seeds: Sequence[int], steps: int | None,
        guidance: float | None, size: tuple[int, int] | None, callback: StepCallback | None, *,
        latents: bool,
    ) -> Tensor:  # fmt: skip
        """Pictures in -1..1, or the last latents."""
        pixels = self.lavit.pixels
        times = pixels.solver(self.scheduler, steps, self.lavit.device).timesteps
        self._interrupt, self._num_timesteps = False, len(times)
        self._guidance_scale = float(pixels.config.guidance if guidance is None else guidance)
        run = pixels.denoise(
            self.lavit.decode(codes), seeds=seeds, steps=steps, guidance=guidance,
            sampler=self.scheduler, size=size,
        )  # fmt: skip
        now = next(run)
        with self.progress_bar(total=len(times)) as bar:
            for step, time in enumerate(times):
                bar.update()
                if callback is not None:
                    now = _changed(callback(self, step, time, {"latents": now}), now)
                if self.interrupt or step + 1 == len(times):
                    break
                now = run.send(now)
        return now if latents else pixels.pictures(now)

    def _shaped(self, found: Tensor, output_type: str, seeds: Sequence[int]) -> Any:
        """What was painted in the form that is asked for; pictures pass the safety check."""
        if output_type == "latent":
            return found
        images = self.runner.release([to_image(picture) for picture in found], seeds)
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


def _refuse(more: Mapping[str, Any], what: str) -> None:
    """Raise `InputError` for an argument of diffusers that would change something."""
    for name, value in more.items():
        if value is not None and (name not in USUAL or value != USUAL[name]):
            raise InputError(f"{what} takes no {name}={value!r:.40}: leave it out")


def _texts(prompt: Any) -> list[str]:
    """Prompts as a list."""
    found = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise InputError(f"prompt is {prompt!r:.40}: give a text, or a list of texts")
    if not found:
        raise InputError("prompt is an empty list: give a text, or a list of texts")
    return [*found]


def _changed(returned: Any, latents: Tensor) -> Tensor:
    """The latents that a callback returned, or those that it was given."""
    found = returned.get("latents", latents) if isinstance(returned, Mapping) else returned
    found = latents if found is None else found
    if not isinstance(found, Tensor) or found.shape != latents.shape or found is returned:
        form = f"a callback returned {type(returned).__name__}"
        shape = f'{{"latents": a tensor of {list(latents.shape)}}}'
        raise InputError(f"{form}: return what it was given, {shape}, or None")
    return found


def _saved(folder: Path | None) -> SchedulerMixin | None:
    """The scheduler that a pipeline was saved with."""
    if folder is None or not (folder / SCHEDULER).is_file():
        return None
    said = read_json(folder / SCHEDULER)
    if said.get("_class_name") == DPMSolver.__name__:
        return DPMSolver.from_config(options(said))
    return noise_schedule(said)


def _seeds(generator: Any, count: int) -> list[int]:
    """A seed for each picture, drawn from its generator (None: torch's own)."""
    given = (
        [generator] if generator is None or not isinstance(generator, list | tuple) else generator
    )
    if not all(one is None or isinstance(one, torch.Generator) for one in given):
        raise InputError(
            f"generator is {generator!r:.40}: give a torch.Generator, or a list of them"
        )
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(SEEDS, (count,), generator=generator, device=device)
        return [int(seed) for seed in drawn]
    if len(generator) != count:
        raise InputError(f"{len(generator)} generators for {count} pictures: give one each, or one")
    return [_seeds(own, 1)[0] for own in generator]
