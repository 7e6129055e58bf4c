"""What the pixel decoder takes from diffusers, strictly loaded and checked (UNets, noise schedules, solvers, null text), and
the arithmetic of noise around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from lavit.config import InputError, PixelsConfig, read_json

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
UNETS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}


def options(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without its private fields."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def unet_of(name: str | None) -> type[ModelMixin]:
    """The UNet class of a name; others raise `InputError`."""
    if name not in UNETS:
        raise InputError(f"pixels: unknown unet class {name!r}, expected one of {', '.join(UNETS)}")
    return UNETS[name]


def noise_schedule(config: dict[str, Any]) -> SchedulerMixin:
    """The noise schedule that a configuration with `_class_name` names."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"pixels: unknown scheduler class {config.get('_class_name')!r}, expected one of diffusers'")
    return kind.from_config(options(config))


def load_strictly(kind: type[ModelMixin], folder: Path, expected: dict[str, Any]) -> ModelMixin:
    """A diffusers model with every weight from the folder and the sizes that the configuration names."""
    found = read_json(folder / "config.json")
    for name, value in options(expected).items():
        moments = name in ("latents_mean", "latents_std", "scaling_factor")  # measured in training
        if not moments and found.get(name) != (list(value) if isinstance(value, tuple) else value):
            raise InputError(f"{folder}: {name} is {found.get(name)}, this configuration expects {value}")
    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    wrong = [
        *info["missing_keys"],
        *info["unexpected_keys"],
        *(str(key) for key in info["mismatched_keys"]),
    ]
    if wrong:
        raise InputError(f"{folder} does not fit its own configuration: {', '.join(wrong[:3])}")
    return model


class DPMSolver(diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ that clips its guess of the clean latents as DDIM does, where `thresholding` is on.

    diffusers' own thresholding sorts every latent for a quantile first, which costs a small denoiser some percent.
    """

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        bound = self.config.sample_max_value
        return sample.clamp(-bound, bound)


Parts = tuple[ModelMixin, AutoencoderKL | None, Tensor | None]


def random_weights(config: PixelsConfig) -> Parts:
    """A new UNet and autoencoder (of the global generator); no null text."""
    vae = AutoencoderKL.from_config(options(config.vae)) if config.vae else None
    return unet_of(config.unet.get("_class_name")).from_config(options(config.unet)), vae, None


def given_weights(config: PixelsConfig) -> Parts:
    """UNet, autoencoder and, for "text", null text of the diffusers folder `config.start_from`, read strictly."""
    folder = Path(config.start_from)
    kind = unet_of(read_json(folder / "unet" / "config.json").get("_class_name"))
    unet = load_strictly(kind, folder / "unet", config.unet)
    vae = load_strictly(AutoencoderKL, folder / "vae", config.vae) if config.vae else None
    return unet, vae, null_text(folder) if config.unconditional == "text" else None


def null_text(folder: Path) -> Float[Tensor, "tokens width"]:
    """What a diffusers folder's text encoder makes of no words: SD 1.5's unconditional context."""
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        text = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} has no tokenizer/ and text_encoder/ for the null text: {reason}") from error
    length = min(text.model_max_length, encoder.config.max_position_embeddings)
    words = text("", padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        return encoder(words.input_ids).last_hidden_state[0]


def solver_of(sampler: str | SchedulerMixin, noise: SchedulerMixin) -> SchedulerMixin:
    """The solver of a name for the noise that the decoder was trained with; a scheduler object is copied."""
    if not isinstance(sampler, str):
        return type(sampler).from_config(sampler.config)
    trained = options(noise.config)
    if sampler == "ddim":
        return diffusers.DDIMScheduler.from_config(trained)
    if sampler != "dpm":
        raise InputError(f'there is no sampler {sampler!r}: choose "dpm" or "ddim"')
    trained |= {
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        # few steps must begin at the last noise level, which "leading" never visits
        "timestep_spacing": "trailing" if trained.get("timestep_spacing") == "trailing" else "linspace",
        "thresholding": bool(trained.get("clip_sample", False)),
        "sample_max_value": float(trained.get("clip_sample_range", 1.0)),
    }
    return DPMSolver.from_config(trained)


def check_widths(
    config: PixelsConfig, unet: UNet2DModel | UNet2DConditionModel, noise: SchedulerMixin, latent: int
) -> None:
    """Raise `InputError` unless a denoiser's channels are those of latents and of what it listens to."""
    widths = unet.config
    grid = config.condition_dim if config.condition == "grid" else 0
    if widths.in_channels != latent + grid:
        raise InputError(f"the unet takes {widths.in_channels} channels, but latents have {latent} and the map {grid}")
    if (config.condition == "grid") != isinstance(unet, UNet2DModel):
        raise InputError('a "grid" condition goes with UNet2DModel, the others with UNet2DConditionModel')
    wide = config.condition_dim + (config.pooled_dim if config.condition == "pooled" else 0)
    if not grid and widths.cross_attention_dim != wide:
        raise InputError(f"the unet listens to {widths.cross_attention_dim} channels, but the context has {wide}")


def clean_latents(scheduler: SchedulerMixin, noisy: Tensor, answer: Tensor, times: Tensor) -> Tensor:
    """The clean latents [images, channels, rows, columns] that a denoiser's answer (noise, velocity or they) stands for."""
    kept = scheduler.alphas_cumprod.to(noisy)[times.long()].reshape(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "epsilon":
        return (noisy - (1 - kept).sqrt() * answer) / kept.sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * answer
    return answer


def linear_guess(scheduler: SchedulerMixin, noisy: Tensor, times: Tensor, *, variance: float) -> Tensor:
    """Best linear guess of the clean latents: it fades where noise drowns them, so that features must decide."""
    kept = scheduler.alphas_cumprod.to(noisy)[times.to(noisy.device).long()].reshape(-1, 1, 1, 1)
    return noisy * kept.sqrt() * variance / (kept * variance + 1 - kept)


def level_weights(scheduler: SchedulerMixin, times: Int[Tensor, "images"], weighting: str) -> Float[Tensor, "images"]:
    """Weights of the loss over noise levels: "equal" or "min-snr" (arXiv 2303.09556)."""
    if weighting == "equal":
        return torch.ones(len(times), device=times.device)
    kept = scheduler.alphas_cumprod.to(times.device)[times]
    ratio = kept / (1 - kept)
    # weights on the squared error of the clean latents are those on the noise's, times the signal-to-noise ratio
    scale = {"epsilon": ratio, "sample": torch.ones_like(ratio)}.get(scheduler.config.prediction_type, ratio + 1)
    return ratio.clamp(max=MIN_SNR_GAMMA) / scale


def normal_noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Normal noise of the shape of `like`: from one generator, or each picture's from its own."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=noise_home(generator, like))
    return torch.cat([normal_noise(one[None], own) for one, own in zip(like, generator, strict=True)])


def noise_home(generator: torch.Generator | None, like: Tensor) -> torch.device:
    """Where noise is drawn: on the generator's own device."""
    return like.device if generator is None else generator.device
