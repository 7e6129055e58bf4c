"""The last look before written pictures leave: the safety check of published weights, and a watermark if one is wanted.

Stable Diffusion comes with a checker that compares CLIP's embedding of a picture with those of unwanted concepts.
diffusers' class hands refused pictures back as black ones; here its verdict alone is taken, and `Refused` says which
pictures were refused and carries the others. The checker's folder lies in the model's folder, as `safety_checker/`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lavit.config import InputError, require
from lavit.images import pixels
from lavit.model import LaVIT

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

FOLDER = "safety_checker"
SOURCE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALLEST_MARKED = 256  # pixels; the watermark's package wants as many on either side


class Refused(InputError):
    """The safety checker refused pictures. `pictures` are all in their order, None where refused."""

    def __init__(self, pictures: Sequence[Image.Image | None], seeds: Sequence[int]) -> None:
        self.pictures = tuple(pictures)
        refused = [str(seed) for seed, picture in zip(seeds, pictures, strict=True) if picture is None]
        super().__init__(
            f"the safety checker refused {len(refused)} of {len(self.pictures)} pictures (seed {', '.join(refused)}): "
            "try other seeds or another prompt"
        )


class SafetyChecker:
    """diffusers' `StableDiffusionSafetyChecker`, asked for its verdict alone."""

    def __init__(self, model: StableDiffusionSafetyChecker) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> SafetyChecker:
        """Read the checker's folder (fp32); one that is missing, damaged or of another model raises `InputError`."""
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        off = "switch the check off with safety=False (--no-safety)"
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is missing, and pictures of published weights are checked: get it with `hf download {SOURCE} "
                f"{FOLDER}/config.json {FOLDER}/model.safetensors --local-dir {folder.parent}`, or {off}"
            )
        try:
            model, info = StableDiffusionSafetyChecker.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, local_files_only=True
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} cannot be read: {str(error).splitlines()[0]}; mend it, or {off}") from error
        wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
        if wrong:
            raise InputError(f"{folder} is no safety checker: {', '.join(sorted(wrong)[:3])}; replace it, or {off}")
        return cls(model.to(device))

    @torch.inference_mode()
    def refused(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture is refused."""
        size = self.model.config.vision_config.image_size
        squares = [ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC) for picture in pictures]
        batch = pixels(squares, size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD).to(self.model.device)
        blank = np.zeros((len(pictures), 1, 1, 3))  # what diffusers would paint black, and would warn that it did
        log = logging.getLogger(type(self.model).__module__)
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            return list(self.model(batch, blank)[1])
        finally:
            log.setLevel(level)


def watermarked(picture: Image.Image, text: str) -> Image.Image:
    """The picture with `text` hidden in the frequencies of its blocks.

    The package invisible-watermark reads it back, except from pictures of flat colour (icons, say): those carry nothing.
    """
    imwatermark = require("imwatermark", extra="watermark")
    if min(picture.size) < SMALLEST_MARKED:
        raise InputError(
            f"a watermark needs {SMALLEST_MARKED} pixels on either side, the picture has {picture.width}x{picture.height}"
        )
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode())
    blue_first = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
    return Image.fromarray(np.ascontiguousarray(encoder.encode(blue_first, "dwtDct")[..., ::-1]))


@dataclass(frozen=True)
class Release:
    """What happens to pictures before a user sees them."""

    checker: SafetyChecker | None = None
    watermark: str | None = None  # text

    def __call__(self, pictures: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """The pictures, watermarked where wanted; raises `Refused` if the checker refuses one."""
        refused = self.checker.refused(pictures) if self.checker else [False] * len(pictures)
        done = [watermarked(picture, self.watermark) if self.watermark else picture for picture in pictures]
        if any(refused):
            raise Refused([None if no else picture for no, picture in zip(refused, done, strict=True)], seeds)
        return done


def release_of(model: LaVIT, *, safety: bool | None = None, watermark: str | None = None) -> Release:
    """The release of a model. `safety` None: as its configuration says, which is on for published weights."""
    if not (model.config.pixels.safety if safety is None else safety):
        return Release(None, watermark)
    if model.folder is None:
        raise InputError("a model without a folder has no safety checker: give safety=False, or load it from a folder")
    return Release(SafetyChecker.load(model.folder / FOLDER, device=model.device), watermark)
