"""What the pixel decoder takes from diffusers, loaded strictly, and the arithmetic of noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor

from lavit.config import InputError, PixelsConfig, read_json
from lavit.files import load_whole
from lavit.pixels.denoiser import GridDenoiser

# Stable Diffusion's noise: what SD 1.5 and SDXL were trained with
STABLE_DIFFUSION_NOISE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MIN_SNR_GAMMA = 5.0
LATENT_VARIANCE = 0.5  # of folded pixels in -1..1
UNet: TypeAlias = UNet2DModel | UNet2DConditionModel | GridDenoiser
Generators = torch.Generator | Sequence[torch.Generator]  # one, or one for each picture


def options(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without its private fields."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def class_of(config: dict[str, Any], what: str, kinds: Any) -> Any:
    """The class that `_class_name` names, diffusers' or `GridDenoiser`.

    Others than those of `kinds` raise `InputError`.
    """
    name = str(config.get("_class_name"))
    ours = {GridDenoiser.__name__: GridDenoiser}
    found = ours.get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise InputError(f"pixels: unknown {what} class {name!r}, expected one of diffusers'")
    return found


def noise_schedule(config: dict[str, Any]) -> SchedulerMixin:
    """The noise schedule that a configuration with `_class_name` names."""
    return class_of(config, "scheduler", SchedulerMixin).from_config(options(config))


def stored_part(kind: type[ModelMixin], folder: Path, expected: dict[str, Any]) -> ModelMixin:
    """A diffusers model with every weight from the folder, of the sizes `expected` names."""
    found = read_json(folder / "config.json")
    for name, value in options(expected).items():
        if found.get(name) != (list(value) if isinstance(value, tuple) else value):
            given = f"{name} is {found.get(name)}"
            raise InputError(f"{folder}: {given}, this configuration expects {value}")
    return load_whole(kind, folder)


class DPMSolver(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]  # Any
    """DPM-Solver++ that clips its guess of the clean latents as DDIM does, if `thresholding` is on.

    diffusers' own sorts every latent for a quantile first: some percent of a small denoiser's time.
    """

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        bound = self.config.sample_max_value
        return sample.clamp(-bound, bound)


def random_weights(config: PixelsConfig) -> tuple[ModelMixin, AutoencoderKL | None]:
    """A new UNet and autoencoder (of the global generator)."""
    vae = AutoencoderKL.from_config(options(config.vae)) if config.vae else None
    return class_of(config.unet, "unet", UNet).from_config(options(config.unet)), vae


def stored_weights(config: PixelsConfig, folder: Path) -> tuple[ModelMixin, AutoencoderKL | None]:
    """UNet and autoencoder of a diffusers folder, read strictly."""
    kind = class_of(read_json(folder / "unet" / "config.json"), "unet", UNet)
    unet = stored_part(kind, folder / "unet", config.unet)
    vae = stored_part(AutoencoderKL, folder / "vae", config.vae) if config.vae else None
    return unet, vae


def null_text(folder: Path) -> Float[Tensor, "tokens width"]:
    """What a diffusers folder's text encoder makes of no words: SD 1.5's unconditional context."""
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        text = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        where = folder / "text_encoder"
        encoder = CLIPTextModel.from_pretrained(where, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} has no tokenizer/ and text_encoder/: {reason}") from error
    length = min(text.model_max_length, encoder.config.max_position_embeddings)
    words = text("", padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        return encoder(words.input_ids).last_hidden_state[0]


def solver_of(sampler: str | SchedulerMixin, noise: SchedulerMixin) -> SchedulerMixin:
    """The solver of a name for the noise of training; a scheduler object is copied."""
    if not isinstance(sampler, str):
        return type(sampler).from_config(sampler.config)
    trained = options(noise.config)
    if sampler == "ddim":
        return diffusers.DDIMScheduler.from_config(trained)
    if sampler != "dpm":
        raise InputError(f'there is no sampler {sampler!r}: choose "dpm" or "ddim"')
    spacing = trained.get("timestep_spacing")
    trained |= {
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        # few steps must begin at the last noise level, which "leading" never visits
        "timestep_spacing": "trailing" if spacing == "trailing" else "linspace",
        "thresholding": bool(trained.get("clip_sample", False)),
        "sample_max_value": float(trained.get("clip_sample_range", 1.0)),
    }
    return DPMSolver.from_config(trained)


def check_widths(config: PixelsConfig, unet: UNet, latent: int) -> None:
    """Raise `InputError` unless a denoiser's channels are those of latents and condition."""
    takes, listens = unet.config.in_channels, unet.config.get("cross_attention_dim")
    grid = config.condition_dim if config.condition == "grid" else 0
    if takes != latent + grid:
        raise InputError(f"the unet takes {takes} channels: latents have {latent}, the map {grid}")
    if (config.condition == "grid") == isinstance(unet, UNet2DConditionModel):
        said = '"grid" goes with GridDenoiser or UNet2DModel'
        raise InputError(f"{said}, other conditions with UNet2DConditionModel")
    wide = config.condition_dim + (config.pooled_dim if config.condition == "pooled" else 0)
    if not grid and listens != wide:
        raise InputError(f"the unet listens to {listens} channels, but the context has {wide}")


def signal_share(schedule: SchedulerMixin, noisy: Tensor, times: Tensor) -> Tensor:
    """Share of the clean latents in the variance of noisy ones [images, 1, 1, 1]."""
    return schedule.alphas_cumprod.to(noisy)[times.to(noisy.device).long()].reshape(-1, 1, 1, 1)


def clean_latents(schedule: SchedulerMixin, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
    """The clean latents that a denoiser's answer (noise, velocity or they) stands for."""
    kept = signal_share(schedule, noisy, times)
    if schedule.config.prediction_type == "epsilon":
        return (noisy - (1 - kept).sqrt() * answer) / kept.sqrt()
    if schedule.config.prediction_type == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * answer
    return answer


def linear_guess(schedule: SchedulerMixin, noisy: Tensor, times: Tensor) -> Tensor:
    """Best linear guess of the clean latents: it fades in noise, so that features must decide."""
    kept = signal_share(schedule, noisy, times)
    return noisy * kept.sqrt() * LATENT_VARIANCE / (kept * LATENT_VARIANCE + 1 - kept)


def level_weights(
    schedule: SchedulerMixin,
    times: Int[Tensor, "images"],
    weighting: str,
) -> Float[Tensor, "images"]:
    """Weights of the loss over noise levels: "equal" or "min-snr" (arXiv 2303.09556)."""
    if weighting == "equal":
        return torch.ones(len(times), device=times.device)
    kept = schedule.alphas_cumprod.to(times.device)[times]
    ratio = kept / (1 - kept)
    # weights on the error of the clean latents are those on the noise's, times this ratio
    scales = {"epsilon": ratio, "sample": torch.ones_like(ratio)}
    scale = scales.get(schedule.config.prediction_type, ratio + 1)
    return ratio.clamp(max=MIN_SNR_GAMMA) / scale
