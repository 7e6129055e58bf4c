"""The last look before written pictures leave: the safety check of published weights, a watermark.

Stable Diffusion's checker compares CLIP's embedding of a picture with those of unwanted concepts.
diffusers paints refused pictures black; here its verdict alone is taken, and `Refused` says which
were refused and carries the others. It lies in the model's folder, as `safety_checker/`.
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
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lavit.config import InputError, require
from lavit.files import load_whole
from lavit.images import pixels
from lavit.model import LaVIT

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

FOLDER = "safety_checker"
SOURCE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALLEST_MARKED = 256  # pixels; the watermark's package wants as many on either side


class Refused(InputError):
    """The safety checker refused pictures; `pictures` are all in order, None where refused."""

    def __init__(self, pictures: Sequence[Image.Image | None], seeds: Sequence[int]) -> None:
        self.pictures = tuple(pictures)
        pairs = zip(seeds, pictures, strict=True)
        refused = [str(seed) for seed, picture in pairs if picture is None]
        super().__init__(
            f"the safety checker refused {len(refused)} of {len(self.pictures)} pictures "
            f"(seed {', '.join(refused)}): try other seeds or another prompt"
        )


class SafetyChecker:
    """diffusers' `StableDiffusionSafetyChecker`, asked for its verdict alone."""

    def __init__(self, model: StableDiffusionSafetyChecker) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> SafetyChecker:
        """Read the checker's folder (fp32); one that is missing or wrong raises `InputError`."""
        from diffusers.pipelines.stable_diffusion import safety_checker

        off = "switch the check off with safety=False (--no-safety)"
        if not (folder / "config.json").is_file():
            files = f"{FOLDER}/config.json {FOLDER}/model.safetensors"
            raise InputError(
                f"{folder} is missing, and pictures of published weights are checked: get it with "
                f"`hf download {SOURCE} {files} --local-dir {folder.parent}`, or {off}"
            )
        try:
            model = load_whole(safety_checker.StableDiffusionSafetyChecker, folder)
        except InputError as error:
            raise InputError(f"{error}; replace it, or {off}") from error
        return cls(model.to(device))

    @torch.inference_mode()
    def refused(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture is refused."""
        size = self.model.config.vision_config.image_size
        bicubic = Image.Resampling.BICUBIC
        squares = [ImageOps.fit(picture, (size, size), bicubic) for picture in pictures]
        batch = pixels(squares, size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD).to(self.model.device)
        blank = np.zeros((len(pictures), 1))  # what diffusers paints black, and warns that it did
        log = logging.getLogger(type(self.model).__module__)
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            return list(self.model(batch, blank)[1])
        finally:
            log.setLevel(level)


def watermarked(picture: Image.Image, text: str) -> Image.Image:
    """The picture with `text` hidden in the frequencies of its blocks.

    invisible-watermark reads it back, except from flat colours (icons, say): those carry nothing.
    """
    imwatermark = require("imwatermark", extra="watermark")
    _check_marked((picture.height, picture.width))
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bytes", text.encode())
    blue_first = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
    return Image.fromarray(np.ascontiguousarray(encoder.encode(blue_first, "dwtDct")[..., ::-1]))


def _check_marked(size: tuple[int, int]) -> None:
    if min(size) < SMALLEST_MARKED:
        said = f"a watermark needs {SMALLEST_MARKED} pixels on either side"
        raise InputError(f"{said}, the picture has {size[1]}x{size[0]}")


@dataclass(frozen=True)
class Release:
    """What happens to pictures before a user sees them."""

    checker: SafetyChecker | None = None
    watermark: str | None = None  # text

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `InputError` where pictures of (height, width) could not carry the watermark."""
        if self.watermark:
            _check_marked(size)

    def __call__(self, pictures: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """The pictures, watermarked where wanted; raises `Refused` if the checker refuses one."""
        refused = self.checker.refused(pictures) if self.checker else [False] * len(pictures)
        done = list(pictures)
        if self.watermark:
            done = [watermarked(picture, self.watermark) for picture in pictures]
        if any(refused):
            kept = [None if no else each for no, each in zip(refused, done, strict=True)]
            raise Refused(kept, seeds)
        return done


def release_of(
    model: LaVIT,
    *,
    safety: bool | None = None,
    watermark: str | None = None,
) -> Release:
    """The release of a model. `safety` None: as configured, which is on for published weights."""
    if watermark:
        require("imwatermark", extra="watermark")
    if not (model.config.pixels.safety if safety is None else safety):
        return Release(None, watermark)
    if model.folder is None:
        remedy = "give safety=False, or load it from a folder"
        raise InputError(f"a model without a folder has no safety checker: {remedy}")
    return Release(SafetyChecker.load(model.folder / FOLDER, device=model.device), watermark)
